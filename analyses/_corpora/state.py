"""`State`: what a corpus has collected so far, in whole numbers: shards add up to the same bits in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from headwater.analyses._corpora.measure import Numbers
from headwater.analyses._corpora.statistics import (
    BINS,
    DISTANCES,
    FRACTION,
    HEADVIS,
    MOST_TOKENS,
    NAMES,
    parts_of,
)
from headwater.lens.errors import AnalysisError

ACTIVATION_BINS = 50
SAMPLE = 64  # texts of a uniform sample, whose activations say what is high and what is low for a head
COUNTS = ("texts", "empty", "short", "cut", "tokens", "repeats")


@dataclass(eq=False)
class State:
    """Sums, counts and bins of every head, its strongest examples, and the texts that these come from.

    Shapes: `sums` [part, statistic, layer, head]; `counts` [statistic, layer, head]; `bins` [statistic, layer, head,
    bin]; `distances` [layer, head, bin]; `headvis` [part, number, layer, head]; `top_*` [statistic, layer, head,
    place]; `vocabulary` [token] sorted; `given` and `taken` [token, layer, head]; `activation` [layer, head, bin]
    counts texts by their largest weight; `sample` [text] and `sampled` [text, layer, head]. Sums are whole numbers
    (`statistics.py`); those of weights alone count fractions. `kept` holds the place and the token ids of each text
    that is an example or in the sample.
    """

    sums: np.ndarray
    counts: np.ndarray
    bins: np.ndarray
    distances: np.ndarray
    headvis: np.ndarray
    top_value: np.ndarray
    top_text: np.ndarray
    top_query: np.ndarray
    top_key: np.ndarray
    vocabulary: np.ndarray
    given: np.ndarray
    taken: np.ndarray
    activation: np.ndarray
    sample: np.ndarray
    sampled: np.ndarray
    told: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    kept: dict[int, tuple[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def empty(cls, layers: int, heads: int, keep: int) -> State:
        """The state before the first text, with `keep` examples of each statistic and head."""
        each, many = (len(NAMES), layers, heads), (len(NAMES), layers, heads, keep)
        none = np.zeros((0, layers, heads), np.int64)
        return cls(
            sums=np.zeros((2, *each), np.int64), counts=np.zeros(each, np.int64),
            bins=np.zeros((*each, BINS), np.int64),
            distances=np.zeros((layers, heads, len(DISTANCES) - 1), np.int64),
            headvis=np.zeros((2, len(HEADVIS), layers, heads), np.int64),
            top_value=np.full(many, -np.inf, np.float32), top_text=np.full(many, -1, np.int64),
            top_query=np.full(many, -1, np.int32), top_key=np.full(many, -1, np.int32),
            vocabulary=np.zeros(0, np.int64), given=none, taken=none,
            activation=np.zeros((layers, heads, ACTIVATION_BINS), np.int64), sample=np.zeros(0, np.int64),
            sampled=np.zeros((0, layers, heads), np.float32),
        )  # fmt: skip

    @property
    def keep(self) -> int:
        return self.top_value.shape[-1]

    def add(
        self, row: int, where: str, ids: np.ndarray, kinds: np.ndarray, layers: Sequence[Numbers]
    ) -> None:
        """Take the numbers of one text of the tokens `ids`, the different ones of which are `kinds`."""
        if self.told["tokens"] + len(ids) > MOST_TOKENS:
            raise AnalysisError(
                f"sums hold {MOST_TOKENS} tokens at most; divide the corpus and keep the parts apart"
            )

        def together(name: str, axis: int) -> np.ndarray:
            return np.stack([getattr(layer, name) for layer in layers], axis)

        one = State(
            sums=parts_of(together("sums", 1)), counts=together("counts", 1), bins=together("bins", 1),
            distances=_fractions(together("distances", 0)),
            headvis=parts_of(together("headvis", 1)),
            **_one_place(together("best", 1), together("query", 1), together("key", 1), row, self.keep),
            vocabulary=kinds, given=_fractions(together("given", 1)), taken=_fractions(together("taken", 1)),
            activation=_activation_bins(together("activation", 0)), sample=np.array([row]),
            sampled=together("activation", 0)[None].astype(np.float32),
            told={**dict.fromkeys(COUNTS, 0), "texts": 1, "tokens": len(ids), "repeats": len(ids) - len(kinds)},
            kept={row: (where, ids)},
        )  # fmt: skip
        self.merge(one)

    def merge(self, other: State) -> None:
        """Take what another state has collected from other texts."""
        for name in ("sums", "counts", "bins", "distances", "headvis", "activation"):
            getattr(self, name)[...] += getattr(other, name)
        self._merge_top(other)
        self._merge_tokens(other)
        self.kept |= other.kept
        sample = np.concatenate([self.sample, other.sample])
        first = sorted(range(len(sample)), key=lambda at: _lot(int(sample[at])))[:SAMPLE]
        self.sample, self.sampled = sample[first], np.concatenate([self.sampled, other.sampled])[first]
        for name in COUNTS:
            self.told[name] += other.told[name]
        if len(self.kept) > 2 * SAMPLE:
            self.prune()

    def prune(self) -> None:
        """Forget texts that are no example any more."""
        used = {*np.unique(self.top_text).tolist(), *self.sample.tolist()}
        self.kept = {row: self.kept[row] for row in sorted(self.kept) if row in used}

    def cut(self, tokens: int, keep: int) -> State:
        """A state with at most `keep` examples, and of each head's token tables its `tokens` strongest."""
        strong = [
            np.argsort(-table, axis=0, kind="stable")[:tokens].ravel() for table in (self.given, self.taken)
        ]
        rows = np.unique(np.concatenate(strong))
        found = replace(
            self, vocabulary=self.vocabulary[rows], given=_strongest(self.given[rows], tokens),
            taken=_strongest(self.taken[rows], tokens), kept=dict(self.kept), told=dict(self.told),
            sample=self.sample[:0], sampled=self.sampled[:0], **{n: getattr(self, n)[..., :keep] for n in TOP},
        )  # fmt: skip
        found.prune()
        return found

    def _merge_top(self, other: State) -> None:
        """The largest values; of equal ones those of the earlier texts."""
        both = [np.concatenate([getattr(state, n) for state in (self, other)], -1) for n in TOP]
        value, text = both[0], both[1]
        order = np.lexsort((text, -value), axis=-1)[..., : self.keep]
        for name, found in zip(TOP, both, strict=True):
            setattr(self, name, np.take_along_axis(found, order, -1))

    def _merge_tokens(self, other: State) -> None:
        """Add by token; the tables grow by the tokens that are new."""
        new = np.setdiff1d(other.vocabulary, self.vocabulary, assume_unique=True)
        if len(new):
            every = np.concatenate([self.vocabulary, new])
            order = np.argsort(every)
            for name in ("given", "taken"):
                table = getattr(self, name)
                grown = np.concatenate([table, np.zeros((len(new), *table.shape[1:]), np.int64)])
                setattr(self, name, grown[order])
            self.vocabulary = every[order]
        place = np.searchsorted(self.vocabulary, other.vocabulary)
        self.given[place] += other.given
        self.taken[place] += other.taken


TOP = ("top_value", "top_text", "top_query", "top_key")
ARRAYS = tuple(each.name for each in fields(State) if each.name not in ("told", "kept"))


def _fractions(weight: np.ndarray) -> np.ndarray:
    return np.rint(weight / FRACTION).astype(np.int64)


def _one_place(
    best: np.ndarray, query: np.ndarray, key: np.ndarray, row: int, keep: int
) -> dict[str, np.ndarray]:
    """The examples of one text, in the first of `keep` places."""
    there = ~np.isnan(best)
    found = {
        "top_value": np.where(there, best, -np.inf).astype(np.float32),
        "top_text": np.where(there, row, -1).astype(np.int64),
        "top_query": np.where(there, query, -1).astype(np.int32),
        "top_key": np.where(there, key, -1).astype(np.int32),
    }
    empty = {"top_value": -np.inf, "top_text": -1, "top_query": -1, "top_key": -1}
    return {
        name: np.concatenate([one[..., None], np.full((*one.shape, keep - 1), empty[name], one.dtype)], -1)
        for name, one in found.items()
    }


def _strongest(table: np.ndarray, tokens: int) -> np.ndarray:
    """The table with zeros in the place of what is not among the `tokens` strongest of its head."""
    order = np.argsort(-table, axis=0, kind="stable")[:tokens]
    found = np.zeros_like(table)
    np.put_along_axis(found, order, np.take_along_axis(table, order, 0), 0)
    return found


def _activation_bins(largest: np.ndarray) -> np.ndarray:
    place = (largest * ACTIVATION_BINS).astype(np.int64).clip(0, ACTIVATION_BINS - 1)
    return (place[..., None] == np.arange(ACTIVATION_BINS)).astype(np.int64)


def _lot(row: int) -> bytes:
    """A number drawn for a text by its row: the same in every shard."""
    return hashlib.sha256(row.to_bytes(8, "little")).digest()
