"""Words of a region: the weight between the patches in a box of the picture and each word of the text.

The way back of word_on_picture: that of one word, over patches; this of one box, over words.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions
from headwater.analyses.vision._words_and_patches import patches_in, weights
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.heads import HeadNames
from headwater.lens.records.record import Record


@analysis
def region_words(
    record: Record,
    region: Annotated[Positions, "patch (row, column) or box (top, left, bottom, right), from 0"] = (0, 0),
    layers: Annotated[Positions, 'layers to average, -1 is the last recorded; "all" for every one'] = "all",
    heads: Annotated[HeadNames, 'heads such as "2.1 3.0"; "all" for those of the layers'] = "all",
    image: Annotated[int, "which picture of each row, counted from 0", Bounds(0)] = 0,
) -> xr.Dataset:
    """`inside[i] = mean over patches j of the region of A_ij`, i each token that is no patch; `outside`: the others.

    Where the queries are the patches and the words are keys, it is `A_ji`. A box holds its bottom row and right column.
    Both are the mean over the chosen heads, [batch, query] (words that look) or [batch, key] (words that are looked
    at); NaN at padding. `ratio` is inside / outside: 1 where the region is like the rest of the picture.
    In a causal text the words before the picture see none of it.

    Question: Which words look at a region of the picture, or are looked at by it?
    Unit: attention weight per patch; ratio: none.
    Source: ours, with the weights of word_on_picture.
    Cost: one walk over the rows of each chosen layer.
    Not for: finding objects: a word may read a region that it does not name.

    >>> import torch
    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model, given = hw.load(zoo.build("llava")), zoo.inputs("llava")
    >>> ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    >>> found = hw.analyses.region_words(model.record(ids, mask, **given), region=(0, 0, 0, 1))
    >>> found.inside.dims, bool(found.inside[0, -1] > 0)
    (('batch', 'query'), True)
    """
    box = np.atleast_1d(np.asarray(region)).tolist() if not isinstance(region, str) else []
    if len(box) not in (2, 4) or not all(isinstance(each, int) for each in box):
        raise AnalysisError(
            f"region is a patch (row, column) or a box (top, left, bottom, right); got {region!r:.60}"
        )
    side, found = weights(record, layers, heads)
    values = found.transpose("batch", side.words, side.patches)
    parts = {name: np.full(values.shape[:2], np.nan) for name in ("inside", "outside")}
    for row in range(len(record.valid)):
        grid = side.grid(row, image)
        within = patches_in(grid, box)
        words = side.is_word(row).numpy()
        for name, chosen in (("inside", within), ("outside", ~within)):
            tokens = grid.tokens()[chosen]
            if len(tokens):
                parts[name][row, words] = values.values[row][np.ix_(words, tokens.numpy())].mean(-1)
    dims = ("batch", side.words)
    kept = {
        n: c
        for n, c in values.coords.items()
        if side.patches not in c.dims and not str(n).endswith(("_row", "_column", "_image", "_frame"))
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        parts["ratio"] = parts["inside"] / parts["outside"]
    found = xr.Dataset({name: (dims, each) for name, each in parts.items()}, kept, {"region": box})
    return found.isel(
        {side.words: np.isfinite(parts["outside"]).any(0) | np.isfinite(parts["inside"]).any(0)}
    )
