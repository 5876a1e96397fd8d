"""`WeightsMap`: maps whose weights are no softmax of one set of scores, with the statistics that make sense of them.

Weights are as they are and nothing is renormalised, as in kernels/maps/statistics.py, whose names and units these
are. A row that is padding or has no key holds NaN (`argmax`: -1) and takes no part in column statistics. Two names
are refused: "lse", as no log-sum-exp belongs to such a row, and "first", as no order says which key it sees first.
What goes by distance is refused where query i and key i are not the same token. Cost: one pass over blocks of rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headwater.kernels.maps.measures import of_rows
from headwater.kernels.maps.statistics import COLUMN, NAMES, RELATIVE, WINDOW
from headwater.kernels.mixers.mixer_map import MixerMap
from headwater.kernels.tiles.shapes import Groups, PerKey, PerQuery

REFUSED = ("lse", "first")


class WeightsMap(MixerMap):
    """A map [batch, head, query, key] of weights; `aligned` says whether query i and key i are the same token."""

    aligned: bool

    @property
    @abstractmethod
    def live(self) -> Bool[Tensor, "batch head query"]:
        """The rows that have weights."""

    @abstractmethod
    def visible(self) -> Int[Tensor, "batch head key"]:
        """How many rows with weights see each key."""

    @property
    def row_mass(self) -> PerQuery:
        """The sum of each row's weights."""
        return (self @ torch.ones(self.shape[3], 1))[..., 0]

    def received(self, queries: Bool[Tensor, "#batch query"] | None = None) -> PerKey:
        """Sum of the weights that some queries put on each key (None: all)."""
        some = torch.ones(1, self.shape[2]) if queries is None else queries.float()
        return (self.T @ some[..., None].expand(self.shape[0], -1, -1))[..., 0]

    def at(self, columns: Int[Tensor, "batch head query n"]) -> Float[Tensor, "batch head query n"]:
        """Weights at some key columns of each row; 0 where a column is outside."""
        found = torch.zeros(columns.shape)
        for rows, weights in self.row_blocks():
            place = columns[:, :, rows].to(weights.device)
            inside = (place >= 0) & (place < self.shape[3])
            picked = weights.gather(-1, place.clamp(0, self.shape[3] - 1))
            found[:, :, rows] = torch.where(inside, picked, 0.0).float().cpu()
        return found

    def measured(self, names: set[str], window: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The named row statistics of some rows at a time, [batch, head, row]."""
        for span, weights in self.row_blocks():
            found = of_rows(weights, names, span.start, False, window)
            if "entropy" in names:
                found["entropy"] = entropy(weights)
            if names & {"max", "argmax"}:
                found["max"], found["argmax"] = weights.max(-1)
            yield span, found

    def statistics(
        self, names: Iterable[str], groups: Groups | None = None, window: int = WINDOW
    ) -> dict[str, Shaped[Tensor, "batch head *numbers"]]:
        """The named statistics: rows [batch, head, query], columns [batch, head, key], mass with a group axis."""
        wanted = list(dict.fromkeys(names))
        self._check(wanted, groups)
        rows = {name for name in wanted if name not in (*COLUMN, "row_mass", "mass")}
        kinds = {"argmax": torch.long}
        found = {name: torch.zeros(self.shape[:3], dtype=kinds.get(name, torch.float32)) for name in rows}
        live = self.live.cpu()
        for span, measured in self.measured(rows, window) if rows else ():
            for name in rows:
                found[name][:, :, span] = measured[name].to(found[name])
        if "row_mass" in wanted:
            found["row_mass"] = self.row_mass.float().cpu()
        if "mass" in wanted and groups is not None:
            members = (groups[None] if groups.dim() == 2 else groups).mT.float()
            found["mass"] = (self @ members.expand(self.shape[0], -1, -1)).mT.float().cpu()
        if {"received", "sink"} & {*wanted}:
            found["received"] = self.received().float().cpu()
        if {"visible", "sink"} & {*wanted}:
            found["visible"] = self.visible().cpu()
        if "sink" in wanted:
            found["sink"] = found["received"] / torch.where(found["visible"] > 0, found["visible"], torch.nan)
        for name in {*found} - {*COLUMN}:
            silent = ~live[:, :, None] if name == "mass" else ~live
            found[name] = found[name].masked_fill(silent, -1 if name == "argmax" else torch.nan)
        return {name: found[name] for name in wanted}

    def _check(self, names: list[str], groups: Groups | None) -> None:
        if unknown := [name for name in names if name not in NAMES]:
            raise ValueError(f"unknown statistics {unknown}; there are {', '.join(NAMES)}")
        if refused := [name for name in names if name in REFUSED]:
            raise ValueError(
                f"{type(self).__name__} has no {refused[0]!r}: its rows are no softmax of scores"
            )
        if not self.aligned and (refused := [name for name in names if name in RELATIVE]):
            raise ValueError(
                f"{refused[0]!r} needs queries and keys that are the same tokens, in the same order"
            )
        if "mass" in names and groups is None:
            raise ValueError("the statistic 'mass' needs groups of keys")
        if "entropy" in names and self.signed:
            raise ValueError("the entropy of weights that may be negative is not defined; leave it out")


def entropy(weights: Tensor) -> Tensor:
    """-sum of w ln w over the last axis; weights of 0 give nothing."""
    return -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1)
