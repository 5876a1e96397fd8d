"""Many redistributions of attention on the same texts; each row of a batch has its own.

A variant sets the heads, the share of weight to keep, and the keys: the sinks, or a control. A row is a text under a
variant, and rows of different variants share a forward pass by `Redistribute(…, rows=…)`; no text is padded. A journal
keeps the numbers of each pass, so that an interrupted sweep can resume.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._measures.bootstrap import finite_mean
from headwater.analyses._prompts.examples import Batch
from headwater.analyses.sinks._control_keys import control_keys, half_of_others
from headwater.analyses.sinks._sink_keys import weight_on
from headwater.lens.edits import Redistribute
from headwater.lens.errors import AnalysisError
from headwater.lens.journal import Journal
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head
from headwater.lens.progress import progress
from headwater.lens.records.record import Record

Treatment = Literal["sinks", "random_heads", "random_keys", "same_mass"]
TREATMENTS: tuple[Treatment, ...] = ("sinks", "random_heads", "random_keys", "same_mass")
# ids -> record, sinks [text, layer, head, key], and the keys that a control may draw [text, key]
Find = Callable[[Tensor], tuple[Record, Tensor, Tensor]]
Value = Callable[[Tensor, Tensor], Tensor]  # rows that run, text of each row -> one number per row


class Variant(NamedTuple):
    """One redistribution: the indices of its head set and `keep`, the treatment, and the draw of a control."""

    heads: int
    keep: int
    treatment: Treatment
    draw: int


class Pool(NamedTuple):
    """Keys that lose weight, bool [text, layer, head, key], and the mean weight of a query on them."""

    keys: Tensor
    mass: Tensor  # [text, layer, head] in float64

    @classmethod
    def of(cls, record: Record, keys: Tensor) -> Pool:
        return cls(keys, weight_on(record, keys).mean(-1))


class Move(NamedTuple):
    """The effect of one variant on the texts of a batch."""

    keys: Tensor  # of the pool, [text, layer, head, key]
    heads: Tensor  # of the variant, [layer, head]
    keep: Tensor  # [text, layer]
    freed: Tensor  # weight per query that moves in the plain run, mean over the heads, [text]

    @property
    def acting(self) -> Tensor:
        """The texts in which any weight moves, bool [text]."""
        return ((self.keys.any(-1) & self.heads) & (self.keep < 1)[..., None]).any(-1).any(-1)


class Begun(NamedTuple):
    """A batch before its edits: `cells`, the data for the journal; the move of each variant; the measure.

    `cells` holds `plain` and `sinks` [text], `freed` [variant][text] (None for a control that does not exist), and
    `jobs`, pairs of a variant and a text in which the variant moves weight.
    """

    cells: dict[str, Any]
    moves: list[Move | None]
    value: Value


@dataclass(frozen=True, eq=False)
class Redistributions:
    """A sweep over head sets (bool [layer, head]), `keeps` and treatments, with `controls` draws per control."""

    model: HookedModel
    sets: Sequence[Tensor]
    keeps: Sequence[float]
    treatments: Sequence[Treatment]
    controls: int
    seed: int

    def variants(self) -> list[Variant]:
        return [
            Variant(s, k, treatment, draw)
            for s in range(len(self.sets))
            for k in range(len(self.keeps))
            for treatment in self.treatments
            for draw in range(1 if treatment == "sinks" else self.controls)
        ]

    def run(
        self,
        batches: Sequence[Batch],
        find: Find,
        value_of: Callable[[Batch], Value],
        rows: int,
        journal: Journal,
        name: str,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Values and freed weight [head set, keep, treatment, text], plain values and sinks per head [text].

        The journal keeps each batch's plain values and jobs under `name`, and the values of each `rows` jobs. A pass
        that it holds does not run again.
        """
        count = sum(len(batch.places) for batch in batches)
        shape = (len(self.sets), len(self.keeps), len(self.treatments), self.controls, count)
        values, freed = np.full(shape, np.nan), np.full(shape, np.nan)
        plain, sinks = np.full(count, np.nan), np.full(count, np.nan)
        variants = self.variants()
        with progress(total=len(variants) * count, desc="redistribution", unit="run") as bar:
            for number, batch in enumerate(batches):
                piece = f"{name}/{number}"
                cells, begun = journal.get(piece), None
                starts = range(0, len(cells["jobs"]) if cells else 0, rows)
                unfinished = any(journal.get(f"{piece}/{start}") is None for start in starts)
                if number == 0 or cells is None or unfinished:
                    begun = self._begin(batch, find, value_of)
                    if cells is None:
                        journal.put(piece, begun.cells)
                    else:
                        _agree(cells, begun.cells, journal.path)
                    cells = cells or begun.cells
                plain[batch.places], sinks[batch.places] = cells["plain"], cells["sinks"]
                for variant, masses in zip(variants, cells["freed"], strict=True):
                    if masses is not None:
                        freed[self._slot(variant)][batch.places] = masses
                        # a text in which no weight moves has exactly its plain value
                        values[self._slot(variant)][batch.places] = cells["plain"]
                jobs = cells["jobs"]
                for start in range(0, len(jobs), rows):
                    some = jobs[start : start + rows]
                    numbers = journal.get(f"{piece}/{start}")
                    if numbers is None:
                        assert begun is not None
                        numbers = self._values(begun, batch, some)
                        journal.put(f"{piece}/{start}", numbers)
                    for (variant, text), found in zip(some, numbers, strict=True):
                        values[self._slot(variants[variant])][batch.places[text]] = found
                    bar.update(len(some))
                bar.update(len(variants) * len(batch.places) - len(jobs))
        return finite_mean(values, -2), finite_mean(freed, -2), plain, sinks

    def _begin(self, batch: Batch, find: Find, value_of: Callable[[Batch], Value]) -> Begun:
        """The plain run of the batch, and the move of every variant."""
        record, found, among = find(batch.ids)
        value = value_of(batch)
        plain = value(batch.ids, torch.arange(len(found)))
        pools = self._pools(record, found, among, batch.places)
        moves = [self._move(variant, pools) for variant in self.variants()]
        cells = {
            "plain": plain.double().tolist(),
            "sinks": found.sum(-1).double().mean((1, 2)).tolist(),
            "freed": [None if move is None else move.freed.tolist() for move in moves],
            "jobs": [
                [number, text]
                for number, move in enumerate(moves)
                if move is not None
                for text in move.acting.nonzero()[:, 0].tolist()
            ],
        }
        return Begun(cells, moves, value)

    def _values(self, begun: Begun, batch: Batch, jobs: Sequence[Sequence[int]]) -> list[float]:
        """The measure of the jobs, (variant, text), in one pass."""
        texts = torch.tensor([text for _, text in jobs])
        pairs = [(move, text) for variant, text in jobs if (move := begun.moves[variant]) is not None]
        with self.model.edit(*edits_of(pairs, self.model.layers)):
            return begun.value(batch.rows(texts), texts).tolist()

    def _slot(self, variant: Variant) -> tuple[int, int, int, int]:
        return variant.heads, variant.keep, self.treatments.index(variant.treatment), variant.draw

    def _pools(
        self, record: Record, sinks: Tensor, among: Tensor, places: list[int]
    ) -> dict[str, list[Pool]]:
        """The keys of each treatment, by draw."""
        pools = {"sinks": [Pool.of(record, sinks)]}
        for name, drawn in (("random_keys", control_keys), ("same_mass", half_of_others)):
            if name in self.treatments:
                keys = [drawn(sinks, among, places, self.seed, draw) for draw in range(self.controls)]
                pools[name] = [Pool.of(record, one) for one in keys]
        return pools

    def _move(self, variant: Variant, pools: dict[str, list[Pool]]) -> Move | None:
        """None for random heads if no head is outside of the set."""
        chosen, keep = self.sets[variant.heads], self.keeps[variant.keep]
        if variant.treatment == "random_heads":
            chosen = other_heads(chosen, self.seed, variant.draw)
            if not chosen.any():
                return None
        source = "sinks" if variant.treatment == "random_heads" else variant.treatment
        pool = pools[source][variant.draw if source == variant.treatment else 0]
        mass = pool.mass * chosen
        kept = torch.full(mass.shape[:2], keep, dtype=torch.float64)
        if source == "same_mass":
            wanted = (1 - keep) * (pools["sinks"][0].mass * chosen).sum(-1)
            kept = (1 - wanted / mass.sum(-1).clamp_min(1e-12)).clamp(0, 1)
        freed = ((1 - kept)[..., None] * mass).sum((1, 2)) / max(int(chosen.sum()), 1)
        return Move(pool.keys, chosen, kept, freed)


def _agree(kept: dict[str, Any], now: dict[str, Any], path: object) -> None:
    """AnalysisError if the plain run has other sinks or values than the journal."""
    same = np.allclose(kept["plain"], now["plain"], rtol=1e-4, atol=1e-5, equal_nan=True)
    if not same or kept["jobs"] != now["jobs"]:
        what = "sinks" if same else "values of the measure"
        raise AnalysisError(
            f"resume: {path} was begun with other {what} on the plain texts (another measure or machine?); delete it"
        )


def other_heads(chosen: Tensor, seed: int, draw: int) -> Tensor:
    """As many random heads outside of a set as in it, bool [layer, head]; all others if there are fewer."""
    outside = (~chosen).flatten().nonzero()[:, 0].numpy()
    picked = np.random.default_rng([seed, draw]).permutation(outside)[: int(chosen.sum())]
    found = torch.zeros(chosen.numel(), dtype=torch.bool)
    found[torch.from_numpy(picked)] = True
    return found.view(chosen.shape)


def edits_of(rows: Sequence[tuple[Move, int]], layers: Sequence[int]) -> Iterator[Redistribute]:
    """The edits of a batch whose row n is a text under a move; heads and rows with equal settings share an edit."""
    heads: dict[tuple, list[int]] = defaultdict(list)
    for row, (move, text) in enumerate(rows):
        for place, layer in enumerate(layers):
            keep = float(move.keep[text, place])
            for head in move.heads[place].nonzero()[:, 0].tolist():
                keys = tuple(move.keys[text, place, head].nonzero()[:, 0].tolist())
                if keys and keep < 1:
                    heads[row, layer, keys, keep].append(head)
    together: dict[tuple, list[int]] = defaultdict(list)
    for (row, layer, keys, keep), members in heads.items():
        together[layer, keys, keep, tuple(members)].append(row)
    for (layer, keys, keep, members), mine in together.items():
        yield Redistribute(
            keys=keys, keep=keep, heads=[Head(layer, head) for head in members], layers=layer, rows=mine
        )
