"""`Axes`: which tokens of a denoiser are patches of the picture, on which grid, and which are words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.lens.diffusion.samples import STATES
from headwater.lens.foreign.module import ForeignModule
from headwater.lens.naming.grids import Grid
from headwater.lens.naming.measured import Labelled, Measured

IMAGE, WORDS = "image", "words"
WORDS_FIRST, IMAGE_FIRST = "words and image", "image and words"
Kind = Literal["self", "cross", "joint"]


def words_in(tensors: Mapping[str, Any]) -> int:
    """The number of words that are given; 0 without any."""
    states = tensors.get(STATES)
    return int(states.shape[1]) if isinstance(states, Tensor) and states.dim() == 3 else 0


def grid_of(tensors: Mapping[str, Any], count: int) -> tuple[int, int] | None:
    """Rows and columns of the picture as `count` tokens; None where they make no grid of its shape."""
    places = tensors.get("img_ids")
    if isinstance(places, Tensor):
        rows, columns = (int(n) + 1 for n in places.reshape(-1, places.shape[-1]).amax(0)[-2:])
        return (rows, columns) if rows * columns == count else None
    latents = next((tensors[name] for name in ("sample", "hidden_states") if name in tensors), None)
    if not isinstance(latents, Tensor) or latents.dim() != 4:
        return None
    height, width = latents.shape[2:]
    for factor in range(1, max(height, width) + 1):
        rows, columns = -(-height // factor), -(-width // factor)
        if rows * columns == count:
            return rows, columns
    return None


def order_of_words(hf: ForeignModule, path: str) -> str:
    """Whether words stand before or behind the picture in joint attention: the queries that other words change.

    `path` is that of the first module with joint attention, where only words have changed.
    """
    tensors = dict(hf.arguments.tensors)
    other = {**tensors, STATES: tensors[STATES].flip(1) + 1.0}
    torch.manual_seed(0)
    queries = [
        next(met.call.q for key, met in hf.calls(given).items() if key.path == path)
        for given in (tensors, other)
    ]
    changed = (queries[0] != queries[1]).any(3).any(1).any(0)
    words = words_in(tensors)
    return WORDS_FIRST if changed[:words].sum() >= changed[-words:].sum() else IMAGE_FIRST


class Axes:
    """Names of tokens for inputs of any size: patches "row,column", words "word 3".

    `kinds` are the parts with their kind, `joint` says which comes first where words and picture stand in one row.
    """

    def __init__(self, kinds: Mapping[str, Kind], joint: str) -> None:
        self.kinds = dict(kinds)
        self.joint = joint

    def labels(self, measured: Measured) -> Iterator[tuple[tuple[str, str], Labelled]]:
        words = words_in(measured.more)
        for name, kind in self.kinds.items():
            for side in ("queries", "keys"):
                if (name, side) not in measured.axes:
                    continue
                count = measured.axes[name, side].shape[1]
                if kind == "cross" and side == "keys":
                    yield (name, side), Labelled([f"word {n}" for n in range(count)], None)
                elif (
                    found := self._labelled(measured.more, count, words if kind == "joint" else 0)
                ) is not None:
                    yield (name, side), found

    def _labelled(self, tensors: Mapping[str, Any], count: int, words: int) -> Labelled | None:
        size = grid_of(tensors, count - words)
        if size is None:
            return None
        rows, columns = size
        grid = Grid(words if self.joint == WORDS_FIRST else 0, 1, rows, columns, columns)
        told = [f"word {n}" for n in range(words)]
        names = grid.names()
        return Labelled(told + names if self.joint == WORDS_FIRST else names + told, grid)

    def words_at(self, part: str, side: str, count: int, words: int) -> slice | None:
        """Where the words stand on an axis of `count` tokens; None where there are none."""
        kind = self.kinds.get(part)
        if kind == "cross" and side == "keys":
            return slice(0, count)
        if kind == "joint":
            return slice(0, words) if self.joint == WORDS_FIRST else slice(count - words, count)
        return None
