"""TextSpan: captions that tell what each head of a tower of images writes.

Gandelsman, Efros & Steinhardt 2024 (arXiv 2310.05916), section 4: a head's contributions to many pictures span few
directions, and captions near these directions name its role.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Seed
from headwater.analyses._measures.bootstrap import redraws
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pictures import captions_of, embeddings_of
from headwater.analyses._streams.image_run import Mean, Pictures
from headwater.analyses._streams.text_spans import Span, projected, span
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel


@analysis
def text_span(
    model: HookedModel,
    examples: Examples,
    texts: Annotated[
        str | Path | Sequence[str] | None, "pool of captions to choose from, or a file with one a line"
    ] = None,
    count: Annotated[int, "texts a head", Bounds(1)] = 5,
    rank: Annotated[
        int | None, "singular vectors of a head's contributions that are kept; none: its width", Bounds(1)
    ] = None,
    mean: Annotated[
        Mean, "each part loses its own mean, or all share that of the stream, as released"
    ] = "own",
    draws: Annotated[int, "redrawings of the pictures, and of random texts", Bounds(1)] = 20,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Repeat: `t* = argmax_t std_k(D t)`, then D and all texts lose the direction of t*; as [layer, head, step].

    D [picture, d] holds a head's contributions to the pictures' embeddings less their mean, and texts are captions'
    embeddings of length 1 on the span of D's first `rank` right singular vectors (D with its mean, as released). `text`
    names what is chosen, `spread` is the standard deviation of the pictures along it, and `explained` the share of D's
    variance that the texts so far rebuild. `random` is that of as many texts in a random order, the mean of `draws`
    orders. `again` is the share of `draws` redrawings of the pictures in which the text is among a head's choices too.
    `variance` [layer, head] is that of D. Steps that a head does not need are "" and NaN. Two pictures at least.

    On clip-digits heads of one layer choose captions of one attribute; docs/vision.md has the numbers. A pool that
    lacks an attribute can not name it, and `random` says how much any captions of the pool would explain.

    Question: Which captions tell what each head writes about a picture?
    Unit: spread: cosine; explained, random and again: share, 0 to 1.
    Source: Gandelsman, Efros & Steinhardt 2024, arXiv:2310.05916, algorithm 1; checked against the authors' code.
    Cost: one forward pass; per head a singular value decomposition and `count` products, 1 + 2·draws times.
    Not for: proving what a head does; the captions name directions in which its writing varies.

    >>> import headwater as hw
    >>> from headwater.data.pictures import canvases, captions
    >>> import random
    >>> model, rng = hw.load("clip-digits"), random.Random(0)
    >>> shots = [canvases.canvas(rng, count=1, held_out=True).picture() for _ in range(20)]
    >>> found = hw.analyses.text_span(model, shots, texts=[each.words for each in captions.single()], count=2, draws=2)
    >>> found.text.dims, bool((found.explained[..., 0] <= found.explained[..., 1]).all())
    (('layer', 'head', 'step'), True)
    """
    captions = captions_of(texts, "texts")
    pictures = Pictures.of(model, examples, batch_size)
    if len(pictures) < 2:
        raise AnalysisError("one picture has no spread; give several, better some hundreds")
    pool = embeddings_of(model, captions)
    heads = of_heads(pictures, mean)
    shape = (*heads.shape[1:3], count)
    found = {name: np.full(shape, np.nan) for name in ("spread", "explained", "random", "again")}
    found_texts, variance = np.full(shape, "", dtype=object), heads.var(0, correction=0).sum(-1).numpy()
    rng, orders = np.random.default_rng(seed), redraws(len(heads), draws, seed)
    for layer, head in np.ndindex(*shape[:2]):
        data = heads[:, layer, head]
        near = projected(data, pool, rank or pictures.tower.shape(pictures.tower.layers[layer]).d_head)
        own = span(data, near, count)
        steps, at = len(own.chosen), (layer, head)
        found_texts[at][:steps] = [captions[n] for n in own.chosen]
        found["spread"][at][:steps], found["explained"][at][:steps] = own.spread, own.explained
        others = [span(data, near, count, rng.permutation(len(pool)).tolist()) for _ in range(draws)]
        found["random"][at] = np.mean([_padded(each, count) for each in others], 0)
        again = [set(span(data[rows], near, count).chosen) for rows in orders]
        found["again"][at][:steps] = [np.mean([n in each for each in again]) for n in own.chosen]
    dims = ("layer", "head", "step")
    return xr.Dataset(
        {
            "text": (dims, found_texts.astype(str)),
            **{name: (dims, values) for name, values in found.items()},
            "variance": (("layer", "head"), variance),
        },
        coords={
            "layer": pictures.tower.layers, "head": np.arange(shape[1]), "step": np.arange(1, count + 1),
        },
        attrs={"pictures": len(heads), "pool": len(captions)},
    )  # fmt: skip


def of_heads(pictures: Pictures, mean: Mean) -> Tensor:
    """What every head writes into the embedding of every picture, [picture, layer, head, d] on the CPU."""
    rows: dict[int, Tensor] = {}
    for places, run in pictures.runs():
        found, _ = run.parts(None, "head", mean)
        rows |= dict(zip(places, found.cpu(), strict=True))
    return torch.stack([rows[n] for n in range(len(rows))])


def _padded(found: Span, count: int) -> np.ndarray:
    """The explained shares, the last one repeated where fewer texts were needed."""
    values = found.explained.numpy()
    last = values[-1] if len(values) else 0.0
    return np.concatenate([values, np.full(count - len(values), last)])
