"""`Corpus`: what every head of a model did over many texts."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from headwater.analyses._corpora import saved
from headwater.analyses._corpora.state import State
from headwater.analyses._corpora.statistics import (
    DISTANCES,
    FRACTION,
    HEADVIS,
    NAMES,
    STATISTICS,
    edges,
    known,
    sum_of,
)
from headwater.kernels.notebook import table
from headwater.lens.errors import AnalysisError, HeadError
from headwater.lens.records.record import FIGURES

NOT_FOR = (
    "saying what a head does to the output (attention is no effect); means over texts of another kind; comparing heads "
    "by their strongest examples alone, which show the end of a distribution"
)
DECILES = np.arange(1, 10) / 10
HEADVIS_NAMES = (
    "self_attention_score", "prev_token_score", "pattern_entropy", "qk_distance", "qk_distance_variance",
    "induction_score",
)  # fmt: skip


class Strong(NamedTuple):
    """An example: where a head's statistic is large. `tokens` are the text's; `query` and `key` are positions in it."""

    value: float
    text: int
    where: str
    query: int
    key: int
    tokens: list[str]


@dataclass(eq=False)
class Corpus:
    """Statistics of every head over a corpus. `corpus` makes it, `Corpus.open` reads it, `merge` adds up shards.

    `run` is what was asked of which model; `shards` says which part of the texts is in it; `words` names tokens.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import headwater as hw
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     texts = Path(folder, "a.txt")
    ...     _ = texts.write_text("Mary gave John a drink")
    ...     found = hw.corpus(hw.load("tasks-4l"), texts, out=Path(folder, "a.safetensors"))
    ...     again = hw.Corpus.open(Path(folder, "a.safetensors"))
    >>> again.complete, again.mean("entropy").equals(found.mean("entropy"))
    (True, True)
    """

    state: State
    run: dict[str, Any]
    shards: list[dict[str, Any]]
    words: dict[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        told = self.state.told
        size = (
            f"{told['texts']} texts, {told['tokens']} tokens, {len(self.layers)} layers × {self.heads} heads"
        )
        return f"Corpus({self.run['model']!r}, {size})"

    def _repr_html_(self) -> str:
        told = self.state.told
        facts = {
            "files": ", ".join(name for name, _ in self.run["source"]["files"][:5]), "texts": told["texts"],
            "cut to the length": told["cut"], "left out as empty": told["empty"],
            "left out as one token": told["short"], "finished": "yes" if self.complete else "no", "not for": NOT_FOR,
        }  # fmt: skip
        return table(repr(self), facts)

    @property
    def layers(self) -> list[int]:
        return self.run["layers"]

    @property
    def heads(self) -> int:
        return self.run["heads"]

    @property
    def complete(self) -> bool:
        """Whether every text of every shard is in it."""
        of = {part["of"] for part in self.shards}
        return len(self.shards) == max(of) and all(part["finished"] for part in self.shards)

    @property
    def whole(self) -> bool:
        """Whether it holds all that merging needs; `small` leaves some out."""
        return not self.run.get("small", False)

    def mean(self, statistic: str) -> xr.DataArray:
        """The mean over all rows in which the statistic is defined (of "received": over keys), [layer, head]."""
        at = _number(statistic)
        with np.errstate(invalid="ignore"):
            found = sum_of(self.state.sums)[at] / self.state.counts[at]
        return self._labelled(found, ("layer", "head"), {}, statistic)

    def histogram(self, statistic: str) -> xr.DataArray:
        """How many rows lie in each bin, exactly, [layer, head, bin]; `low` and `high` are the bins' edges."""
        ends = edges(known(statistic))
        coords = {"low": ("bin", ends[:-1]), "high": ("bin", ends[1:])}
        dims = ("layer", "head", "bin")
        return self._labelled(self.state.bins[_number(statistic)], dims, coords, statistic)

    def deciles(self, statistic: str) -> xr.DataArray:
        """The nine deciles of the rows, [layer, head, decile]: from exact counts, straight within a bin.

        `error` is the width of the bin in which a decile lies; the decile itself is nowhere else.
        """
        counts, ends = self.state.bins[_number(statistic)], edges(statistic)
        below = np.concatenate([np.zeros((*counts.shape[:2], 1), np.int64), counts.cumsum(-1)], -1)
        total = below[..., -1:]
        asked = DECILES * total  # [layer, head, decile]
        bin = (below[..., None, 1:] < asked[..., None]).sum(-1).clip(0, counts.shape[-1] - 1)
        low, inside = np.take_along_axis(below, bin, -1), np.take_along_axis(counts, bin, -1)
        part = (asked - low) / np.maximum(inside, 1)
        width = (ends[1:] - ends[:-1])[bin]
        found = np.where(total > 0, ends[bin] + part * width, np.nan)
        coords = {"decile": DECILES, "error": (("layer", "head", "decile"), width)}
        return self._labelled(found, ("layer", "head", "decile"), coords, statistic)

    def distances(self) -> xr.DataArray:
        """The share of the weight at each distance |query - key|, in bins of powers of two, [layer, head, bin]."""
        mass = self.state.distances * FRACTION
        with np.errstate(invalid="ignore"):
            share = mass / mass.sum(-1, keepdims=True)
        last = int(np.nonzero(self.state.distances.any((0, 1)))[0].max(initial=0)) + 1
        coords = {"low": ("bin", DISTANCES[:last]), "high": ("bin", DISTANCES[1 : last + 1])}
        found = self._labelled(share[..., :last], ("layer", "head", "bin"), coords, "distances")
        return found.assign_attrs(
            unit="share of the weight", about="weight by |query - key|, from low to below high"
        )

    def headvis(self) -> pd.DataFrame:
        """The six numbers of the public HeadVis pipeline by layer and head, by its definitions."""
        told = self.state.told
        rows = np.array(
            [told["tokens"], told["tokens"] - told["texts"], *[told["tokens"]] * 3, told["repeats"]]
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            of = dict(zip(HEADVIS, sum_of(self.state.headvis) / rows[:, None, None], strict=True))
        of["distance_squared"] = of["distance_squared"] - of["distance"] ** 2
        index = pd.MultiIndex.from_product([self.layers, range(self.heads)], names=["layer", "head"])
        return pd.DataFrame(
            {name: found.ravel() for name, found in zip(HEADVIS_NAMES, of.values(), strict=True)}, index
        )

    def table(self) -> pd.DataFrame:
        """The mean of every statistic, a head a row."""
        columns = {name: self.mean(name).values.ravel() for name in NAMES}
        index = pd.MultiIndex.from_product([self.layers, range(self.heads)], names=["layer", "head"])
        return pd.DataFrame(columns, index)

    def find(
        self,
        by: str,
        n: int = 10,
        layer: int | None = None,
        decile: float | None = None,
        lowest: bool = False,
    ) -> pd.DataFrame:
        """The `n` heads with the largest mean, or `decile` (0.1 to 0.9), of a statistic; of all layers or of one."""
        if decile is None:
            scores = self.mean(by)
        elif np.isclose(DECILES, decile).any():
            scores = self.deciles(by).sel(decile=decile, method="nearest", drop=True)
        else:
            raise AnalysisError(f"decile is one of 0.1, 0.2, … 0.9; got {decile!r}")
        found: pd.Series = scores.to_series().dropna()
        if layer is not None:
            found = found.loc[found.index.get_level_values("layer") == layer]
        order: pd.DataFrame = found.to_frame(by).sort_values(by, ascending=lowest, kind="stable")
        return order.iloc[:n]

    def examples(self, layer: int, head: int, statistic: str = "weight") -> list[Strong]:
        """Where the statistic is largest, one place in a text; of equal values those of earlier texts come first."""
        row, at = self._place(layer, head), _number(statistic)
        found = []
        for place in range(self.state.keep):
            value, text, query, key = (
                getattr(self.state, name)[at, row, head, place].item()
                for name in ("top_value", "top_text", "top_query", "top_key")
            )
            if text >= 0:
                where, ids = self.state.kept.get(text, ("", np.zeros(0, int)))
                found.append(Strong(value, text, where, query, key, [self.word(i) for i in ids.tolist()]))
        return found

    def tokens(
        self, layer: int, head: int, side: Literal["from", "to"] = "to", n: int = 20
    ) -> list[tuple[str, float]]:
        """Tokens with the largest weight on ("to") or of ("from") them; the first token of a text counts as no key."""
        if side not in ("from", "to"):
            raise AnalysisError(f"side is 'from' or 'to'; got {side!r}")
        row = self._place(layer, head)
        mass = (self.state.given if side == "from" else self.state.taken)[:, row, head]
        order = np.lexsort((self.state.vocabulary, -mass))[:n]
        ids = self.state.vocabulary[order].tolist()
        return [(self.word(i), w * FRACTION) for i, w in zip(ids, mass[order].tolist(), strict=True) if w > 0]

    def word(self, token: int) -> str:
        return self.words.get(token, f"<{token}>")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; nothing in it is executed when it is opened."""
        self.state.prune()
        header = {"run": self.run, "shards": self.shards, "words": self.words}
        return saved.save(self.state, header, path)

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Corpus:
        """Read a saved corpus; RecordError for what is none. `verify` compares the digest of every tensor."""
        state, header = saved.open_state(path, verify)
        return cls(state, header["run"], header["shards"], header["words"])

    @classmethod
    def merge(cls, parts: Iterable[Corpus]) -> Corpus:
        """Shards of one corpus as one: the same bits in whatever order they come."""
        parts = sorted(parts, key=lambda part: [each["shard"] for each in part.shards])
        if not parts:
            raise AnalysisError("there is nothing to merge; give the results of shards")
        first = parts[0]
        state = State.empty(len(first.layers), first.heads, first.state.keep)
        for part in parts:
            if part.run != first.run or not part.whole:
                why = (
                    _differs(first.run, part.run)
                    if part.whole
                    else "a small result has left out what is added up"
                )
                raise AnalysisError(f"these are no shards of one corpus: {why}")
            state.merge(part.state)
        state.prune()
        shards = [dict(each) for part in parts for each in part.shards]
        if len({each["shard"] for each in shards}) < len(shards) or len({each["of"] for each in shards}) > 1:
            raise AnalysisError("a shard is given twice, or they are shards of different numbers of them")
        words = {i: w for part in parts for i, w in part.words.items()}
        return cls(state, first.run, shards, dict(sorted(words.items())))

    def small(self, tokens: int = 20, keep: int = 3) -> Corpus:
        """What a page or a reader asks for, to be handed on: fewer examples, and the strongest tokens of each head.

        Sums, counts and bins stay as they are. It can not be merged.
        """
        state = self.state.cut(tokens, keep)
        used = {*state.vocabulary.tolist(), *(i for _, ids in state.kept.values() for i in ids.tolist())}
        words = {i: w for i, w in self.words.items() if i in used}
        return Corpus(state, {**self.run, "keep": state.keep, "small": True}, self.shards, words)

    def figure(
        self, statistic: str = "weight", layer: int | None = None, head: int | None = None, **more: Any
    ) -> Any:
        """The plotly figure of a statistic's means, a tile a head; of one head: deciles and distances."""
        draw = importlib.import_module(FIGURES).figure
        place = {} if layer is None or head is None else {"layer": layer, "head": head}
        return draw(self, statistic=statistic, **place, **more)

    def _place(self, layer: int, head: int) -> int:
        if layer not in self.layers or not 0 <= head < self.heads:
            raise HeadError(
                f"no such head: {layer}.{head}; there are {self.heads} heads in layers {self.layers}"
            )
        return self.layers.index(layer)

    def _labelled(
        self, values: np.ndarray, dims: tuple[str, ...], coords: dict[str, Any], name: str
    ) -> xr.DataArray:
        axes = {"layer": self.layers, "head": np.arange(self.heads), **coords}
        found = xr.DataArray(values, dims=dims, coords=axes, name=name)
        about = STATISTICS.get(name)
        told = {"model": self.run["model"], "texts": self.state.told["texts"], "not_for": NOT_FOR}
        return found.assign_attrs(told | ({"unit": about.kind, "about": about.about} if about else {}))


def _number(statistic: str) -> int:
    return NAMES.index(known(statistic))


def _differs(one: dict[str, Any], other: dict[str, Any]) -> str:
    name = next(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return f"{name} is {str(one.get(name))[:60]} in one and {str(other.get(name))[:60]} in another"
