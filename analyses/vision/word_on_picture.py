"""Word on the picture: the weight between one word of a text and each patch of its picture.

In a model that reads pictures in its text the word looks at patches; in the cross-attention of a text-to-image model
the patches look at the word.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.analyses.vision._words_and_patches import columns_of_word, weights
from headwater.lens.naming.heads import HeadNames
from headwater.lens.records.record import Record


@analysis
def word_on_picture(
    record: Record,
    word: Annotated[str, "a word of the text, its last occurrence; none: the last token"] = "",
    position: Annotated[int, "position of the token where no word is given"] = -1,
    layers: Annotated[Positions, 'layers to average, -1 is the last recorded; "all" for every one'] = "all",
    heads: Annotated[HeadNames, 'heads such as "2.1 3.0"; "all" for those of the layers'] = "all",
) -> xr.DataArray:
    """`w[j] = mean over the chosen heads of A_ij`, i the word, j each key; of a split word the mean of its tokens.

    Where the queries are the patches and the words are keys, it is `A_ji`. The tokens that are no patches stand beside
    the patches on the same axis; `hw.on_grid` takes the patches alone, and `hw.figure(…, image=)` lays them over the
    picture. [batch, key], or [batch, query] where patches look. AnalysisError for a record without patches.

    Question: Which parts of the picture does a word look at, or is looked at by?
    Unit: attention weight.
    Source: reading of text rows on the grid as in Kaduri, Bagon & Dekel 2025, arXiv:2411.17491, and of columns as in
    Tang et al. 2023 (DAAM), arXiv:2210.04885, there summed over layers after scaling to one size.
    Cost: one walk over the rows of each chosen layer.
    Not for: what the model knows of the region: values and later layers decide that.

    >>> import torch
    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("vit"))
    >>> record = model.record(pixel_values=zoo.inputs("vit")["pixel_values"])
    >>> found = hw.analyses.word_on_picture(record, word="[CLS]", layers=-1)
    >>> bool((abs(found.sum("key") - 1) < 1e-5).all()), hw.on_grid(found).dims
    (True, ('batch', 'row', 'column'))
    """
    side, found = weights(record, layers, heads)
    rows = []
    for row in range(len(record.valid)):
        one = side.spoken.valid[[row]]
        picked = (
            columns_of_word(side.spoken, row, word)
            if word
            else columns_of(position, one, "position")[0].tolist()
        )
        rows.append(found.isel(batch=row, **{side.words: picked}).mean(side.words, keep_attrs=True))
    dropped = ["position", f"{side.words}_token", *(f"{side.words}_{name}" for name in ("row", "column"))]
    joined = xr.concat([each.drop_vars(dropped, errors="ignore") for each in rows], "batch", coords="all")
    joined = joined.rename("word_on_picture").assign_coords(batch=np.arange(len(rows)))
    return joined.assign_attrs(word=word or f"position {position}", looks=side.words)
