"""Weights between the words and the patches of a record, whichever side looks.

Where keys are patches (a text that holds pictures, a tower of pictures, joint attention), a word looks at them. Where
queries alone are patches (cross-attention of a text-to-image model), they look at the words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from headwater.analyses._prompts.positions import Positions
from headwater.analyses.tokens.raw_attention import raw_attention
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.grids import Grid
from headwater.lens.naming.heads import HeadNames
from headwater.lens.records.contents import Axis
from headwater.lens.records.record import Record

MARKS = " \u0120\u2581\u010a\n"  # how tokenizers write a space or the end of a line


class Sides(NamedTuple):
    """The axis of words and that of patches, as results name them, and who stands on each."""

    words: str
    patches: str
    spoken: Axis
    pictured: Axis

    def grid(self, row: int, image: int) -> Grid:
        """A picture of a batch row."""
        held = self.pictured.grids[row]
        if not 0 <= image < len(held):
            raise AnalysisError(f"image={image}, but batch row {row} has {len(held)} pictures; count from 0")
        return held[image]

    def is_word(self, row: int) -> Tensor:
        """Which tokens on the axis of words are real and no patches, bool [position]."""
        kept = self.spoken.valid[row].clone()
        for grid in self.spoken.grids[row] if self.spoken.grids else ():
            kept[grid.tokens()] = False
        return kept


def sides(record: Record) -> Sides:
    """Where words and patches stand; AnalysisError for a record without patches."""
    if any(record.key_axis.grids):
        return Sides("query", "key", record.query_axis, record.key_axis)
    if any(record.query_axis.grids):
        return Sides("key", "query", record.key_axis, record.query_axis)
    others = [f"record.part({name!r})" for name, part in record.parts.items() if any(part.grids)]
    here = f", here {', '.join(others)}" if others else ""
    raise AnalysisError(f"the record has no patches of a picture; give one that has{here}")


def weights(record: Record, layers: Positions, heads: HeadNames) -> tuple[Sides, xr.DataArray]:
    """All weights [batch, query, key], the mean over the chosen heads."""
    return sides(record), raw_attention(record, queries="all", layers=layers, heads=heads)


def columns_of_word(axis: Axis, row: int, word: str) -> list[int]:
    """The tokens that make up a word in a text, its last occurrence. AnalysisError offers the words that are there."""
    texts = [token.strip(MARKS).lower() for token in axis.strings[row]]
    asked = word.strip(MARKS).lower()
    real = np.flatnonzero(axis.valid[row].numpy()).tolist()
    for place in range(len(real) - 1, -1, -1) if asked else ():
        joined, taken = "", []
        for column in real[place:]:
            joined += texts[column]
            taken.append(column)
            if joined == asked:
                return taken
            if not asked.startswith(joined):
                break
    known = list(dict.fromkeys(axis.strings[row][c].strip(MARKS) for c in real if "," not in texts[c]))
    raise AnalysisError(
        f"the word {word!r:.40} is not in the text of batch row {row}; its tokens are {', '.join(known)[:200]}"
    )


def patches_in(grid: Grid, region: list[int]) -> Tensor:
    """Which patches of a picture lie in a box, bool [patch]. AnalysisError where it lies beyond the grid."""
    top, left, bottom, right = region if len(region) == 4 else [*region, *region]
    _, rows, columns = grid.shape
    if not (0 <= top <= bottom < rows and 0 <= left <= right < columns):
        raise AnalysisError(
            f"region {', '.join(map(str, region))} (top, left, bottom, right; the last ones included) lies beyond the "
            f"grid of {rows} × {columns} patches, counted from 0"
        )
    _, row, column = grid.coordinates().T
    return (row >= top) & (row <= bottom) & (column >= left) & (column <= right)
