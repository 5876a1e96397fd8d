"""Text heat map: which patches of a picture write towards a caption.

Gandelsman, Efros & Steinhardt 2024 (arXiv 2310.05916), section 5: the contributions of patches, summed over heads and
layers, along a text.
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
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pictures import captions_of, directions_of
from headwater.analyses._streams.image_run import Mean, Pictures
from headwater.lens.model import HookedModel


@analysis
def text_heatmap(
    model: HookedModel,
    examples: Examples,
    texts: Annotated[str | Path | Sequence[str] | None, "captions, or a file with one a line"] = None,
    against: Annotated[
        str | Path | Sequence[str] | None,
        "captions whose mean is subtracted, or a file; none: those of texts",
    ] = None,
    mean: Annotated[
        Mean, "each part loses its own mean, or all share that of the stream, as released"
    ] = "own",
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """`heat[t, i] = c_i·t - mean_{t' in against} c_i·t'` as [batch, text, key]; c_i is what patch i writes.

    c_i sums the direct contributions `P·LN(A_cls,i v_i W_O)/|M|` of all heads and layers (image_contributions). Keys
    are tokens, the class token first; row and column say where a patch stands, and `hw.figure(result, image=picture)`
    draws the patches over the picture. One caption without `against` has nothing to subtract, and is the plain sum.
    Only what patches write into the class token is seen: what one patch first tells another counts where it is read.
    Read along `text` it is the other way round: which captions a patch writes.

    Question: Which patches write towards a caption, and which captions does a patch write?
    Unit: cosine.
    Source: Gandelsman, Efros & Steinhardt 2024, arXiv:2310.05916; checked against the authors' code.
    Cost: one forward pass, and captions × patches numbers for each head in turn.
    Not for: what would happen without a patch (blank_out).

    >>> import headwater as hw, random
    >>> from headwater.data.pictures import canvases
    >>> canvas = canvases.canvas(random.Random(0), count=1)  # a bright zero bottom right
    >>> places = [f"a digit {place}" for place in canvases.PLACES]
    >>> heat = hw.analyses.text_heatmap(hw.load("clip-digits"), canvas.picture(), texts=places)
    >>> heat.dims, heat.shape  # a class token and 8 × 8 patches
    (('batch', 'text', 'key'), (1, 4, 65))
    """
    captions = captions_of(texts, "texts")
    pictures = Pictures.of(model, examples, batch_size)
    heat = of_patches(pictures, directions_of(model, captions, against, alone=True), mean)
    return xr.DataArray(
        heat.transpose(1, 2).numpy(),
        dims=("batch", "text", "key"),
        coords={"batch": np.arange(len(heat)), "text": captions, **pictures.keys()},
        name="text_heatmap",
    )


def of_patches(pictures: Pictures, towards: Tensor, mean: Mean = "own") -> Tensor:
    """What every token of every picture writes towards directions [text, d], [picture, key, text] on the CPU."""
    rows: dict[int, Tensor] = {}
    for places, run in pictures.runs():
        found, _ = run.parts(towards, "patch", mean)
        rows |= dict(zip(places, found.cpu(), strict=True))
    return torch.stack([rows[n] for n in range(len(rows))])
