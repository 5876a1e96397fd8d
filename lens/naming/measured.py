"""`Measured`: inputs of a model of which only a run tells how many tokens they become."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.naming.grids import Grid
from headwater.lens.naming.tokens import Tokens


class Labelled(NamedTuple):
    """The names of the tokens on an axis, and the grid that they stand on, if any."""

    strings: list[str]
    grid: Grid | None


class Measured(Tokens):
    """Tokens with `axes`, the tokens of every part by (part, "queries" or "keys"), as a run of the model met them.

    `along` names the axis of the batch of each input in `more`: 0, 1, or None for one that all examples share.
    `named` are the axes whose tokens a user has named.
    """

    axes: Mapping[tuple[str, str], Tokens]
    along: Mapping[str, int | None]
    named: Mapping[tuple[str, str], Labelled]

    @classmethod
    def of(
        cls, main: Tokens, more: Mapping[str, Tensor], axes: Mapping[tuple[str, str], Tokens],
        along: Mapping[str, int | None], named: Mapping[tuple[str, str], Labelled],
    ) -> Measured:  # fmt: skip
        found = cls(main.ids, main.mask, more)
        found.axes, found.along, found.named = axes, along, named
        return found

    @classmethod
    def joined(cls, rows: Sequence[Measured]) -> Measured:
        """Inputs of equal shapes under each other. PromptError where an input that all examples share differs."""
        first, more = rows[0], {}
        for name, given in first.more.items():
            every, along = [row.more[name] for row in rows], first.along.get(name)
            if along is None and not all(torch.equal(given, other) for other in every):
                raise PromptError(
                    f"{name} is one for all examples of a run, and differs between these; give them apart"
                )
            more[name] = given if along is None else torch.cat(every, along)
        axes = {key: _under([row.axes[key] for row in rows]) for key in first.axes}
        main = _under(rows)
        return cls.of(main, more, axes, first.along, first.named)

    def rows(self, which: Any, ids: Tensor | None = None) -> Measured:
        """Some rows with the inputs and the tokens that belong to them; `ids` are numbers here and change nothing."""
        batch = len(self)
        more = {name: _picked(given, which, self.along.get(name)) for name, given in self.more.items()}
        axes = {
            key: Tokens(_of(side.ids, which, batch), _of(side.mask, which, batch))
            for key, side in self.axes.items()
        }
        return self.of(Tokens(self.ids[which], self.mask[which]), more, axes, self.along, self.named)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Measured.of, (Tokens(self.ids, self.mask), self.more, self.axes, self.along, self.named)

    def __deepcopy__(self, memo: Any) -> Measured:
        main = Tokens(self.ids.clone(), self.mask.clone())
        return self.of(
            main, copy.deepcopy(self.more, memo), copy.deepcopy(self.axes, memo), self.along, self.named
        )


def _under(rows: Sequence[Tokens]) -> Tokens:
    return Tokens(torch.cat([row.ids for row in rows]), torch.cat([row.mask for row in rows]))


def _picked(given: Tensor, which: Any, axis: int | None) -> Tensor:
    """Some examples of an input, whatever axis they are on."""
    if axis is None:
        return given
    return given[which] if axis == 0 else given.movedim(axis, 0)[which].movedim(0, axis)


def _of(rows: Tensor, which: Any, batch: int) -> Tensor:
    """The rows of some examples, where each example may have several (frames, windows)."""
    if len(rows) % batch:
        return rows
    return rows.unflatten(0, (batch, len(rows) // batch))[which].flatten(0, 1)
