"""The numbers per head that the Overview can show, each with its unit, its colour limits and where it comes from.

Row statistics are means over the tokens after the first: in a causal model the first token sees only itself, and
its row would lift every head alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import streamlit as st
import xarray as xr

from headwater.analyses._catalogue.catalogue import entry
from headwater.analyses.sinks._received_share import received_share
from headwater.dashboard import runs
from headwater.dashboard.runs import Run

Limits = Callable[[Run], tuple[float, float] | None]


@dataclass(frozen=True)
class Score:
    """One choice of the Overview; ``of(model name, prompt)`` gives [layer, head]."""

    label: str
    unit: str
    meaning: str
    of: Callable[[str, str], xr.DataArray]
    limits: Limits = lambda run: None


def _share(run: Run) -> tuple[float, float]:
    return 0.0, 1.0


def _row_mean(statistic: str) -> Callable[[str, str], xr.DataArray]:
    def of(name: str, prompt: str) -> xr.DataArray:
        values = runs.base_run(name, prompt).record.statistic(statistic).isel(batch=0)
        return values.isel(query=slice(1, None) if values.sizes["query"] > 1 else slice(None)).mean(
            "query", skipna=True
        )

    return of


def _sink(name: str, prompt: str) -> xr.DataArray:
    return entry("sink_rate").function(runs.base_run(name, prompt).record)["received_share"]


@st.cache_data(
    max_entries=8, show_spinner="Measuring how much the loss depends on each head …", show_time=True
)
def _importance(name: str, prompt: str, how: str) -> xr.DataArray:
    return runs.alone(lambda: entry("head_importance").function(runs.resident(name), [prompt], how=how))


@st.cache_data(max_entries=2, show_spinner="Watching each head on repeated random tokens …", show_time=True)
def _roles(name: str) -> xr.DataArray:
    return runs.alone(lambda: entry("head_roles").function(runs.resident(name)))


def _role(role: str) -> Callable[[str, str], xr.DataArray]:
    return lambda name, prompt: _roles(name).sel(role=role, drop=True)


def _even_spread(run: Run) -> tuple[float, float]:
    return 0.0, math.log(max(run.length, 2))


SCORES = {
    "first": Score(
        "Attention to the first token", "share",
        "mean weight that tokens give to the first token; above 0.3 it is counted as an attention sink", _sink, _share,
    ),
    "previous": Score(
        "Attention to the previous token", "share", "mean weight on the token just before",
        _row_mean("previous"), _share,
    ),
    "self": Score(
        "Attention to itself", "share", "mean weight of a token on its own position, the first token left out",
        _row_mean("self"), _share,
    ),
    "max": Score(
        "Strongest weight", "share",
        "mean of each token's largest weight, the first token left out; 1 looks at one token only",
        _row_mean("max"), _share,
    ),
    "entropy": Score(
        "Entropy", "nats",
        "how widely a token spreads its attention: from 0 (one token only) to an even spread over the prompt",
        _row_mean("entropy"), _even_spread,
    ),
    "distance": Score(
        "Distance", "tokens", "mean distance between a token and what it attends to, the first token left out",
        _row_mean("distance"),
    ),
}  # fmt: skip
CAUSAL = {
    "induction": Score(
        "Induction", "share", "on repeated random tokens, weight on what followed the same token before",
        _role("prefix_matching"), _share,
    ),
    "duplicate": Score(
        "Duplicate token", "share", "on repeated random tokens, weight on the same token's earlier place",
        _role("duplicate"), _share,
    ),
    "importance": Score(
        "Importance (gradient)", "nats per unit of gate",
        "how strongly the loss on this prompt reacts to turning the head down", partial(_importance, how="gradient"),
    ),
    "ablation": Score(
        "Importance (ablation)", "rise of loss, nats",
        "by how much the loss on this prompt rises when the head is removed; below 0 it falls",
        partial(_importance, how="ablation"),
    ),
}  # fmt: skip


def offered(run: Run) -> dict[str, Score]:
    """The scores that this model can be asked for on this prompt."""
    return SCORES if run.loss is None else SCORES | CAUSAL


def margins(run: Run, layer: int, head: int) -> tuple[xr.DataArray, xr.DataArray]:
    """Exact margins of one map: the share each key receives, the entropy of each query."""
    received = received_share(run.record).isel(batch=0).sel(layer=layer).isel(head=head)
    entropy = run.record.statistic("entropy").isel(batch=0).sel(layer=layer).isel(head=head)
    return received, entropy
