"""Segmentation score: how well maps of a picture find what a caption names, where its mask is known.

Gandelsman, Efros & Steinhardt 2024 (arXiv 2310.05916), section 5; protocol after Chefer, Gur & Wolf 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Draws, Seed
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._measures.masks import SCORES, masks_of, over_picture, scores_of
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pictures import captions_of, directions_of, pixels_of, tokens_of
from headwater.analyses._streams.image_run import Pictures
from headwater.analyses.tokens.raw_attention import raw_attention
from headwater.analyses.tokens.relevance import relevance
from headwater.analyses.tokens.rollout import rollout
from headwater.analyses.vision.text_heatmap import of_patches
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

METHODS = ("text_heatmap", "raw_attention", "rollout", "relevance", "random")


@analysis
def segmentation(
    model: HookedModel,
    examples: Examples,
    texts: Annotated[
        str | Path | Sequence[str] | None, "the caption of what is masked in each picture, or a file"
    ] = None,
    masks: Annotated[
        str | Path | Sequence[Any] | None, "bool [picture, height, width], or files of masks"
    ] = None,
    against: Annotated[
        str | Path | Sequence[str] | None, "captions whose mean is subtracted, or a file; none: all of texts"
    ] = None,
    methods: Annotated[str, "maps to score, from " + ", ".join(METHODS)] = " ".join(METHODS),
    draws: Draws = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Pixel accuracy, mean of both classes' intersection over union, and average precision, each [attribution, batch].

    Maps of patches: `text_heatmap` of the picture's own caption; `raw_attention` of the class token in the last layer,
    heads averaged; its `rollout`; its gradient `relevance` to the similarity of picture and caption; and `random`
    normal numbers, one draw a picture. Only the first and the fourth know the caption. A map is spread bilinearly over
    the pixels of the mask, cut off below 0, stretched to 0 … 1, and cut at its mean (as released); average precision
    needs no cut, and that of a random map is about the mask's share of the picture, the attribute `inside`. `mean`,
    `low` and `high` [score, attribution] are means over pictures and bounds that hold 95 % of the means of resampled
    ones. The released code adds intersections and unions over all pictures; here each picture has its own.

    Question: How well do maps of patches find what a caption names?
    Unit: share, 0 to 1.
    Source: Gandelsman, Efros & Steinhardt 2024, arXiv:2310.05916; Chefer, Gur & Wolf 2021, arXiv:2103.15679.
    Cost: one forward pass, a record of the maps, and for relevance a backward pass.
    Not for: pictures in which the caption holds of more than the mask.

    >>> import headwater as hw, numpy as np, random
    >>> from headwater.data.pictures import canvases
    >>> rng = random.Random(0)
    >>> drawn = [canvases.canvas(rng, count=2, held_out=True) for _ in range(4)]
    >>> place = [next(n for n, thing in enumerate(each.things) if thing) for each in drawn]
    >>> texts = [f"a digit {canvases.PLACES[n]}" for n in place]
    >>> masks = np.stack([each.mask(n) for each, n in zip(drawn, place)])
    >>> found = hw.analyses.segmentation(hw.load("clip-digits"), [each.picture() for each in drawn], texts, masks)
    >>> found.average_precision.dims, found["mean"].shape
    (('attribution', 'batch'), (3, 5))
    """
    asked = methods.replace(",", " ").split()
    if not asked or len(set(asked)) < len(asked) or not set(asked) <= set(METHODS):
        raise AnalysisError(f"methods={methods!r}: give some of {', '.join(METHODS)}, each once")
    pictures = Pictures.of(model, examples, batch_size)
    captions = captions_of(texts, "texts")
    if len(captions) != len(pictures):
        raise AnalysisError(f"{len(pictures)} pictures have {len(captions)} captions; give one each")
    inside = masks_of(masks, len(pictures))
    grid = pictures.texts.grids[0][0]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in asked:
        heat = _map(name, model, pictures, examples, captions, against, seed, batch_size)
        patches = heat[:, grid.tokens()].reshape(-1, grid.rows, grid.columns)
        found[name] = scores_of(over_picture(patches, (inside.shape[1], inside.shape[2])), inside)
    values = {score: np.stack([found[name][score] for name in asked]) for score in SCORES}
    stacked = np.moveaxis(np.stack(list(values.values())), -1, 0)  # [picture, score, attribution]
    return xr.Dataset(
        {
            **{score: (("attribution", "batch"), each) for score, each in values.items()},
            **intervals(stacked, ("score", "attribution"), draws, seed),
        },
        coords={"attribution": asked, "score": list(SCORES), "batch": np.arange(len(pictures))},
        attrs={"inside": float(inside.double().mean()), "pictures": len(pictures)},
    )


def _map(
    name: str, model: HookedModel, pictures: Pictures, examples: Examples, captions: list[str], against: Any,
    seed: int, batch_size: int,
) -> Tensor:  # fmt: skip
    """One map of all tokens of every picture, [picture, key]."""
    tower = pictures.tower
    if name == "text_heatmap":
        every = of_patches(pictures, directions_of(model, captions, against))
        return every[torch.arange(len(every)), :, torch.arange(len(every))]
    if name == "random":
        made = torch.Generator().manual_seed(seed)
        return torch.randn(pictures.texts.valid.shape, generator=made, dtype=torch.float64)
    pixels = pixels_of(tower, examples)
    if name == "relevance":
        found = relevance(
            tower, tower.to_tokens(captions, pixel_values=pixels), queries=[0], batch_size=batch_size
        )
    else:
        record = tower.record(tokens_of(tower, pixels))
        found = (raw_attention if name == "raw_attention" else rollout)(record, queries=[0])
    return torch.tensor(found.values)[:, 0].double()
