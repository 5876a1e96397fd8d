"""The maps of a record in the order in which the model ran them, each as a step from one row of tokens to the next.

A record of one stack has one side, its own tokens, and a step replaces every position by a mixture of positions. Where
the record also holds the cross-attention of the same positions and the stack that it looks at, there are two sides. A
step of cross-attention leaves the source as it is and mixes it into the queries:
`own' = (w·own + (1 - w)·Ā·source) / (w + (1 - w)·Ā·1)`. So the product of all steps is that of block matrices over the
tokens of both sides, which `dense_steps` writes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._prompts.positions import position_coordinates
from headwater.analyses.tokens._layer_map import (
    Joining,
    Mixers,
    Reduction,
    attributes,
    joined_rows,
    over_row_sums,
)
from headwater.analyses.tokens._sinks_aside import Without, one_token
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.grids import Grid, Grids
from headwater.lens.records.record import Record

CHUNK = 64  # columns per pass: about the width of a head, so that a pass costs one attention call
Sides = dict[str, Tensor]  # by side, [batch, position, asked]
OWN, SOURCE = "own", "source"


@dataclass(frozen=True, eq=False)
class Step:
    """Layer number `depth` of a joining; `side` is what it changes, `seen` what it looks at."""

    record: Record
    joining: Joining
    depth: int
    side: str = OWN
    seen: str = OWN

    @property
    def weight(self) -> float:
        return self.joining.weight

    def pulled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows over the outputs [batch, query, asked], as rows over what stays in place and over what is looked at."""
        mixing = self.joining.mixing[self.depth]
        if isinstance(mixing, str):  # in blocks of rows: a maximum over heads is not linear, nor are shares
            kept = torch.zeros_like(rows)
            moved = rows.new_zeros(len(rows), self.record.key_axis.valid.shape[1], rows.shape[2])
            for span, merged in joined_rows(self.record, self.joining, self.depth):
                merged = merged.float()
                block = over_row_sums(rows[:, span], merged.sum(-1), self.weight)
                moved += torch.einsum("bqk,bqt->bkt", merged, block)
                kept[:, span] = block
            return self.weight * kept, (1 - self.weight) * moved
        rows = over_row_sums(rows, self._mass(mixing), self.weight)
        moved = self._attention(rows, mixing, transposed=True)
        if self.joining.kept is not None:
            moved = moved * self.joining.kept[..., None]
        return self.weight * rows, (1 - self.weight) * moved

    def pushed(self, own: Tensor, seen: Tensor) -> Tensor:
        """Shares after the layer, [batch, query, asked], from those before it. The last column carries the share that
        comes from rows without any weight, which makes a result undefined."""
        mixing = self.joining.mixing[self.depth]
        if isinstance(mixing, str):
            moved, mass = torch.zeros_like(own), own.new_zeros(own.shape[:2])
            for span, merged in joined_rows(self.record, self.joining, self.depth):
                merged = merged.float()
                moved[:, span], mass[:, span] = merged @ seen, merged.sum(-1)
        else:
            looked_at = seen if self.joining.kept is None else seen * self.joining.kept[..., None]
            moved, mass = self._attention(looked_at, mixing), self._mass(mixing)
        total = ((1 - self.weight) * mass + self.weight)[..., None]
        shares = (self.weight * own + (1 - self.weight) * moved) / torch.where(total > 0, total, 1.0)
        shares[..., -1:].masked_fill_(total == 0, 1.0)
        return shares

    def _mass(self, mixing: Tensor) -> Tensor:
        """The row sums of Ā over the keys that count, [batch, query]: not 1 less the sinks, which would cancel."""
        if self.joining.kept is not None:
            return self._attention(self.joining.kept[..., None], mixing)[..., 0]
        mass = torch.from_numpy(self.record.statistic("row_mass").sel(layer=self.layer).values)
        return torch.einsum("h,bhq->bq", mixing, mass.nan_to_num())

    def _attention(self, given: Tensor, mixing: Tensor, transposed: bool = False) -> Tensor:
        """`Ā @ given`, or `Āᵀ @ given`, [batch, position, asked]."""
        map = self.record.map(self.layer)
        matrix = map.T if transposed else map
        moved = [
            torch.einsum("h,bhqt->bqt", mixing, (matrix @ chunk.contiguous()).float().cpu())
            for chunk in given.split(CHUNK, dim=2)
        ]
        return torch.cat(moved, dim=2)

    @property
    def layer(self) -> int:
        return self.joining.layers[self.depth]

    def dense(self) -> Tensor:
        """Ā, [batch, query, key] in float64; quadratic memory."""
        batch, queries = self.record.valid.shape
        joined = torch.zeros(batch, queries, self.record.key_axis.valid.shape[1], dtype=torch.float64)
        for span, rows in joined_rows(self.record, self.joining, self.depth):
            joined[:, span] = rows
        return joined


@dataclass(frozen=True, eq=False)
class Steps:
    """All steps of a record, the first one first. `strings`, `valid` and `grids` are of the tokens of all sides, those
    of the source before the record's own; `parts` names the sides where there are two."""

    record: Record
    steps: list[Step]
    joinings: dict[str, Joining]
    strings: list[list[str]]
    valid: Tensor
    grids: Grids = ()
    parts: tuple[str, ...] = ()
    offset: int = 0  # of the record's own tokens
    told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, record: Record, residual: float, heads: Reduction | Sequence[Sequence[float]], add_residual: bool,
        last_layer: int | None, mixers: Mixers, without: Without = None,
    ) -> Steps:  # fmt: skip
        settings = (residual, heads, add_residual)
        joining = Joining.of(record, *settings, last_layer, mixers, without)
        own = [Step(record, joining, depth) for depth in range(len(joining.layers))]
        told = attributes(record, joining)
        cross = _crossing(record)
        if cross is None:
            return cls(record, own, {OWN: joining}, record.strings, record.valid, record.grids, told=told)
        if not isinstance(heads, str):
            raise AnalysisError(
                "heads holds weights of one stack, and this record is of a stack with cross-attention; give "
                "heads='mean', 'max' or 'min'"
            )
        top = joining.layers[-1] if last_layer is None else last_layer
        layers = [layer for layer in cross.layers if layer <= top or last_layer is None]
        joinings = {OWN: joining}
        across: list[Step] = []
        if layers:
            joinings["cross"] = Joining.of(cross, *settings, layers[-1], mixers, without)
            across = [Step(cross, joinings["cross"], n, OWN, SOURCE) for n in range(len(layers))]
        source, below = cross.key_axis, _source(record, cross)
        if below is not None:
            joinings[SOURCE] = Joining.of(below, *settings, None, mixers, without)
            below_steps = [Step(below, joinings[SOURCE], n, SOURCE, SOURCE) for n in range(len(below.layers))]
        else:
            below_steps = []
        offset = source.valid.shape[1]
        moved = tuple(
            (*of_source, *(Grid(grid.start + offset, *grid[1:]) for grid in of_own))
            for of_source, of_own in zip(
                source.grids or ((),) * len(record.valid),
                record.grids or ((),) * len(record.valid),
                strict=True,
            )
        )
        names = cross.provenance.get("axes", ("decoder", "encoder"))
        return cls(
            record, [*below_steps, *_in_order(record, own, across)], joinings,
            [a + b for a, b in zip(source.strings, record.strings, strict=True)],
            torch.cat([source.valid, record.valid], 1), moved, (str(names[1]), str(names[0])), offset,
            told | _set_aside(joinings, {OWN: record, "cross": cross, SOURCE: below}),
        )  # fmt: skip

    @property
    def causal(self) -> bool:
        return self.record.causal and not self.parts

    def pull(self, rows: Tensor) -> Tensor:
        """Rows of the product, [batch, asked, token], from the last step to the first. `rows` [batch, own, asked]."""
        sides = {OWN: rows, SOURCE: rows.new_zeros(len(rows), self.offset, rows.shape[2])}
        for step in reversed(self.steps):
            kept, moved = step.pulled(sides[step.side])
            sides[step.side] = kept
            sides[step.seen] = sides[step.seen] + moved
        found = torch.cat([sides[SOURCE], sides[OWN]], 1)
        return found.mT.masked_fill(found.isnan().any(1)[..., None], torch.nan)

    def push(self, shares: Tensor) -> Tensor:
        """Columns of the product, [batch, own, asked], from the first step up. `shares` [batch, token, asked]."""
        shares = torch.nn.functional.pad(shares, (0, 1))
        sides = {SOURCE: shares[:, : self.offset], OWN: shares[:, self.offset :]}
        for step in self.steps:
            sides[step.side] = step.pushed(sides[step.side], sides[step.seen])
        return sides[OWN][..., :-1].masked_fill(sides[OWN][..., -1:] > 0, torch.nan)

    def dense_steps(self) -> Iterator[Tensor]:
        """Each step as a matrix over the tokens of all sides, [batch, token, token] in float64; NaN in rows without
        weight."""
        batch, count = self.valid.shape
        spans = {SOURCE: slice(0, self.offset), OWN: slice(self.offset, count)}
        for step in self.steps:
            side, seen = spans[step.side], spans[step.seen]
            matrix = torch.eye(count, dtype=torch.float64).repeat(batch, 1, 1)
            matrix[:, side, side] *= step.weight
            matrix[:, side, seen] += (1 - step.weight) * step.dense()
            matrix[:, side] /= matrix[:, side].sum(-1, keepdim=True)
            yield matrix

    def coordinates(
        self, queries: Any, columns: Tensor, keys: Any = "all", followed: Tensor | None = None
    ) -> dict:
        """Coordinates of a result [batch, query, key] over the tokens of all sides."""
        found = position_coordinates(self.record, queries, columns, keys, followed, self)
        if self.parts:
            part = np.where(np.arange(self.valid.shape[1]) < self.offset, *self.parts)
            found["key_part"] = (
                ("key", part) if followed is None else (("batch", "key"), part[followed.numpy()])
            )
        return found

    def one_token(self, shares: np.ndarray, columns: Tensor, keys: Tensor | None = None) -> dict[str, str]:
        """What a result says where one token holds nearly all of it."""
        if not self.parts:
            return self.joinings[OWN].one_token(self.record, shares, columns, keys)
        return one_token(self, False, shares, columns + self.offset, keys)


def _crossing(record: Record) -> Record | None:
    """The cross-attention of the same positions."""
    for part in record.parts.values():
        if part.keys is not None and part.tokens.equal(record.tokens):
            return part
    return None


def _source(record: Record, cross: Record) -> Record | None:
    """The stack whose outputs the cross-attention looks at; None where it is not recorded."""
    axes = cross.provenance.get("axes", ("", ""))
    for part in record.parts.values():
        own = part.keys is None and list(part.provenance.get("axes", ())) == [axes[1]] * 2
        if own and part.tokens.shape == cross.key_axis.tokens.shape:
            return part
    return None


def _in_order(record: Record, own: list[Step], across: list[Step]) -> list[Step]:
    """The steps of both parts in the order of the run: by layer, and in a layer as the blocks have them."""
    both = [*across, *own] if record.provenance.get("cross_first") else [*own, *across]
    return sorted(both, key=lambda step: step.joining.layers[step.depth])


def _set_aside(joinings: dict[str, Joining], records: dict[str, Record | None]) -> dict[str, str]:
    """Which sinks of each side are set aside, in one text."""
    found = {
        name: attributes(record, joinings[name]).get("set_aside")
        for name, record in records.items()
        if record is not None and name in joinings
    }
    told = [f"{name}: {text}" for name, text in found.items() if text]
    return {"set_aside": "; ".join(told)} if told else {}
