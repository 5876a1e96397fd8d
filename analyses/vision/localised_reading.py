"""Localised reading: does a token that writes an answer look where in the picture the answer stands?

After the finding of Kaduri et al. (CVPR 2025) that details are read from the image tokens of their own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Draws, Seed
from headwater.analyses._measures.bootstrap import interval
from headwater.analyses._prompts.answers import check_reads
from headwater.analyses._prompts.examples import Examples, as_tokens, singles_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.grids import Grid
from headwater.lens.progress import progress

PLACES = {"top": ("row", 0), "bottom": ("row", 1), "left": ("column", 0), "right": ("column", 1)}


@analysis
def localised_reading(
    model: HookedModel,
    examples: Examples,
    regions: Annotated[
        str | Sequence[Any], "where the answer stands: words such as top left, or masks"
    ] = "top left",
    query: Annotated[int, "token that looks: the one that writes the answer"] = -1,
    draws: Draws = 2000,
    seed: Seed = 0,
) -> xr.Dataset:
    """`share[l, h] = Σ_{j in region} A_qj / Σ_{j in image} A_qj` of the query that writes the answer, over examples.

    `regions`: where the answer stands, one for all examples or one for each: words ("top left", "bottom", …), or a
    mask of the picture [row, column] of any size, of which a patch is part where most of it is true. Dataset, means
    with 95 % bounds over [layer, head]: `share`; `shuffled`, the same with the region of another example, which is
    what a habit of looking somewhere gives; `gap`, share minus shuffled; `hit`, how often the most attended patch lies
    in the region; `image_mass`, the weight on the picture; and `chance`, the region's share of the patches.

    Question: Which heads read the place of the picture that is asked for?
    Unit: share of the attention on the picture, 0 to 1.
    Source: Kaduri, Bagon & Dekel, CVPR 2025 (there the argmax and a segmenter's mask); the shares and the shuffled
    control are ours.
    Cost: one forward pass per example.
    Not for: what a head moves from there: look at what happens without it.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> given = zoo.inputs("llava", lengths=(11, 11))
    >>> prompts = model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])
    >>> hw.analyses.localised_reading(model, prompts, ["left", "right"]).share.shape
    (2, 4)
    """
    check_reads(model)
    rows = singles_of(model, examples)
    alone = isinstance(regions, str) or (isinstance(regions, np.ndarray | Tensor) and np.ndim(regions) == 2)
    given: Sequence[Any] = [regions] * len(rows) if alone else list(regions)
    if len(given) != len(rows):
        raise AnalysisError(f"regions holds {len(given)} for {len(rows)} examples; give one, or one for each")
    weights, inside = [], []
    for place, (row, region) in enumerate(
        progress([*zip(rows, given, strict=True)], desc="reading", unit="text")
    ):
        record = model.record(as_tokens(row), statistics=())
        pictures = record.grids[0] if record.grids else ()
        if len(pictures) != 1 or pictures[0].frames != 1:
            raise AnalysisError(
                f"example {place} has {len(pictures)} pictures with a grid of patches; give one with one"
            )
        end = record.tokens.shape[1]
        if not -end <= query < end:
            raise AnalysisError(f"query={query}, but example {place} has {end} tokens; give one that it has")
        at = pictures[0].tokens()
        looked = [
            record.map(n).tile(slice(query % end, query % end + 1), slice(0, end))[0, :, 0]
            for n in record.layers
        ]
        weights.append(torch.stack(looked)[:, :, at].double().cpu())
        inside.append(region_of(region, pictures[0], place))
    if len({len(each) for each in inside}) > 1:
        raise AnalysisError("the pictures have grids of different size; give pictures of one size together")
    seen, where = (
        torch.stack(weights).numpy(),
        torch.stack(inside).double().numpy(),
    )  # [b, layer, head, patch]
    mass = seen.sum(-1)
    known = mass > 0
    share, other = (
        np.where(known, (seen * each[:, None, None]).sum(-1) / np.where(known, mass, 1), np.nan)
        for each in (where, where[_others(len(where), seed)])
    )
    hit = np.take_along_axis(where[:, None, None], seen.argmax(-1)[..., None], -1)[..., 0]
    found: dict[str, Any] = {}
    parts = {"share": share, "shuffled": other, "gap": share - other, "hit": hit, "image_mass": mass}
    for name, values in parts.items():
        for end_, part in zip(("", "_low", "_high"), interval(values, draws, seed), strict=True):
            found[f"{name}{end_}"] = (("layer", "head"), part)
    found["chance"] = float(where.mean())
    return xr.Dataset(
        found,
        coords={"layer": model.layers, "head": np.arange(model.n_heads)},
        attrs={"examples": len(rows)},
    )


def region_of(region: Any, grid: Grid, place: int = 0) -> Tensor:
    """Which patches of a grid are in a region, bool [patch], from words or a mask of the picture."""
    frame_row_column = grid.coordinates()
    if isinstance(region, str):
        kept = torch.ones(len(frame_row_column), dtype=torch.bool)
        for word in region.split():
            if word not in PLACES:
                raise AnalysisError(
                    f"regions: {word!r} of example {place} is none of {', '.join(PLACES)}; or give a mask"
                )
            axis, half = PLACES[word]
            count, numbers = (
                (grid.rows, frame_row_column[:, 1])
                if axis == "row"
                else (grid.columns, frame_row_column[:, 2])
            )
            kept &= (2 * numbers + 1 < count) if half == 0 else (2 * numbers + 1 > count)
    else:
        mask = torch.as_tensor(np.asarray(region)).float()
        if mask.dim() != 2 or mask.shape[0] < grid.rows or mask.shape[1] < grid.columns:
            raise AnalysisError(
                f"regions: the mask of example {place} is {list(mask.shape)}; give one [row, column] of at least "
                f"{grid.rows} × {grid.columns}, the patches"
            )
        pooled = torch.nn.functional.adaptive_avg_pool2d(
            (mask != 0).float()[None, None], (grid.rows, grid.columns)
        )
        kept = (pooled[0, 0] > 0.5).flatten()
    if not kept.any() or kept.all():
        raise AnalysisError(
            f"the region of example {place} holds {int(kept.sum())} of {len(kept)} patches; give a part"
        )
    return kept


def _others(count: int, seed: int) -> np.ndarray:
    """For each example another one: a shuffled circle."""
    order = np.random.default_rng(seed).permutation(count)
    found = np.empty(count, dtype=int)
    found[order] = np.roll(order, 1)
    return found
