"""Where attention drains in a run, by which rules, what it carries there, and how that goes on over generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

import headwater as hw
from headwater.analyses._catalogue.catalogue import entry
from headwater.analyses.sinks._received_share import share_and_visible
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.runs import Run, editing, model_of
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError
from headwater.lens.models.embedded import embedded
from headwater.lens.progress import progress

LEAST = 8  # queries that must see a token before its share is compared
RULES = {
    "share": "share above a limit",
    "gu": "Gu: share in the first 64 tokens",
    "act": "ACT: far above an even spread",
    "massive": "massive activation",
    "spectral": "leading direction of the map",
}
HOW = {"mean": "mean of the heads", "max": "largest of the heads", "heads": "heads above the limit"}
KEEP = 0.4
FAMILY = "sink-2l-"
FAMILY_TEXT = (
    "river and river stone lamp cat dog fox oak elm salt with salt door cat dog fox oak elm gold or gold bench red cup "
    "river stone lamp cat blue and blue pearl owl"
)


@dataclass(frozen=True)
class Shares:
    """The share that each key receives, `of` [layer, head, key], and how many queries see it, `seen` likewise."""

    of: xr.DataArray
    seen: np.ndarray

    def enough(self, least: int) -> int:
        """How many queries must see a key: `least`, or on short inputs as many as see the best seen key."""
        return min(least, int(self.seen.max(initial=0)))

    def few(self, least: int) -> np.ndarray:
        """Keys that fewer queries see than is enough, [layer, key]."""
        return self.seen.max(axis=1) < self.enough(least)

    def by_layer(self, how: str, limit: float) -> np.ndarray:
        """One number per layer and key: the mean or largest share of the heads, or how many exceed the limit."""
        values = self.of.values
        with np.errstate(all="ignore"):
            if how == "heads":
                found = np.where(np.isfinite(values), values > limit, np.nan).mean(axis=1)
            else:
                found = np.nanmax(values, axis=1, initial=0.0) if how == "max" else values.mean(axis=1)
        return np.where(np.isfinite(values).any(axis=1), found, np.nan)

    def at(self, pairs: Sequence[tuple[int | None, int | None]], count: int) -> Shares:
        """These shares at `count` keys of another run; `pairs` are its positions and the own ones that belong together.
        NaN at keys that have no counterpart, which no query sees."""
        both = [(there, here) for there, here in pairs if there is not None and here is not None]
        there, here = (list(side) for side in zip(*both, strict=True)) if both else ([], [])
        layers, heads, _ = self.of.shape
        share, seen = np.full((layers, heads, count), np.nan), np.zeros((layers, heads, count))
        share[..., there], seen[..., there] = self.of.values[..., here], self.seen[..., here]
        coords = {name: self.of.coords[name] for name in ("layer", "head") if name in self.of.coords}
        return Shares(xr.DataArray(share, dims=self.of.dims, coords=coords), seen)

    def overall(self) -> np.ndarray:
        """The mean share of each key over layers and heads, [key]."""
        return self.of.mean(("layer", "head"), skipna=True).values

    def of_heads(self, keys: Sequence[int]) -> xr.DataArray:
        """The largest share of these keys in each head, [layer, head]."""
        return self.of.isel(key=list(keys)).max("key").rename("received_share")


def shares(run: Run) -> Shares:
    share, seen = share_and_visible(run.record)
    of = share.isel(batch=0).transpose("layer", "head", "key")
    counts = seen.isel(batch=0).transpose("layer", "head", "key").values
    return Shares(of, np.nan_to_num(counts))


def first_keys(found: Shares, limit: float, least: int) -> list[int]:
    """The token that most heads give more than the limit, of those that enough queries see; then the larger share."""
    few = found.few(least).all(axis=0)
    heads, mean = (
        np.where(few, -1.0, np.nan_to_num(found.by_layer(how, limit)).mean(axis=0))
        for how in ("heads", "mean")
    )
    return [int(np.lexsort((mean, heads))[-1])]


def above(found: Shares, keys: Sequence[int], limit: float) -> list[str]:
    """The heads that give one of the keys more than the limit, by name."""
    share = found.of_heads(keys)
    return [
        f"{int(share['layer'][i])}.{j}" for i, j in np.argwhere(np.nan_to_num(share.values) > limit).tolist()
    ]


def redistribution(keys: Sequence[int], heads: Sequence[str]) -> dict[str, Any]:
    """The edit that gives most of what these heads put on the keys to other tokens, as data."""
    return {
        "edit": "Redistribute", "keys": list(keys), "keep": KEEP, "to": "others", "heads": list(heads), "layers": "all",
    }  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """What needs values and the residual stream: `rules` [token, rule] is the fraction of heads (or layers) for which
    a token is a sink; `norms` is `sink_norms`, None where it does not fit. `told` says what does not fit."""

    rules: pd.DataFrame
    norms: xr.Dataset | None
    told: tuple[str, ...]


def recorded(state: State, run: Run, keys: Sequence[int], limit: float, least: int) -> Recorded:
    """A second record of the run, with values and the residual stream, read by all rules; tokens that fewer than
    `least` queries see have no score."""
    norms, columns, told = None, {}, []
    if run.of_record:
        record = run.record
    else:
        model = model_of(state, run)
        with torch.no_grad(), editing(run):
            record = model.record(
                model.to_tokens(run.example), statistics=("received", "visible"), keep=("qkv", "residual")
            )
    for rule in progress(RULES, desc="rules", unit="rule"):
        more = {"min_queries": least} | ({"threshold": limit} if rule in ("share", "gu") else {})
        try:
            columns[rule] = (
                entry("find_sinks").function(record, rule=rule, **more)["heads"].isel(batch=0).values
            )
        except HeadwaterError as error:
            told.append(f"{RULES[rule]}: {error}")
    try:
        norms = entry("sink_norms").function(record, keys=list(keys))
    except HeadwaterError as error:
        told.append(f"norms of values: {error}")
    frame = pd.DataFrame(columns, index=range(len(run.keys)))
    return Recorded(frame, norms, tuple(told))


def contribution(state: State, run: Run, keys: Sequence[int]) -> xr.Dataset:
    """What the sinks carry, of the heads' outputs and of the prediction."""
    model = model_of(state, run)
    with editing(run):
        return entry("sink_contribution").function(model, [run.example], keys=list(keys), draws=10)


@dataclass(frozen=True)
class Generated:
    """The weight on the sinks over a text that was generated: `mass` [layer, query], the mean of the heads."""

    mass: xr.DataArray
    tokens: list[str]
    first: int  # new token


def generated(state: State, run: Run, keys: Sequence[int], steps: int) -> Generated:
    model = resident(run.name)
    with torch.no_grad(), editing(run):
        _, record = model.generate(
            model.to_tokens(run.example), max_new_tokens=steps, record=True, statistics=("mass",),
            groups={"sink": list(keys)},
        )  # fmt: skip
    mass = record.statistic("mass").sel(group="sink").isel(batch=0).mean("head")
    return Generated(mass, record.strings[0], len(run.queries))


def can_generate(run: Run, model: hw.HookedModel) -> bool:
    return run.causal and model.has_lm_head and not model.is_encoder_decoder and not run.part


def family() -> list[str]:
    """The models that differ in the rule of their attention alone."""
    return [name for name in embedded() if name.startswith(FAMILY)]


def family_text(text: str) -> str:
    """The text, where the family knows its words, else one of its own."""
    names = family()
    known = bool(names) and bool(text) and not resident(names[0]).unknown_words(text)
    return text if known else FAMILY_TEXT


def compared(text: str, limit: float) -> pd.DataFrame:
    """One line per model of the family: how much its first token receives, by its weights and by unit rows."""
    lines = []
    for name in progress(family(), desc="sink models", unit="model"):
        model = resident(name)
        with torch.no_grad():
            record, loss = model.record(text), float(model.loss(text)[0])
        plain = entry("sink_rate").function(record, threshold=limit)
        unit = entry("sink_rate").function(record, threshold=limit, unit_rows=True)
        lines.append(
            {
                "model": name.removeprefix(FAMILY), "sink rate": float(plain.sink_rate),
                "of unit rows": float(unit.sink_rate), "mean share": float(plain.received_share.mean()),
                "largest share": float(plain.received_share.max()),
                "row sum": float(record.statistic("row_mass").mean()), "loss": loss,
            }
        )  # fmt: skip
    return pd.DataFrame(lines)
