"""Scores of heads for the page: from the record at once, from jobs once these have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard.canvas.mosaic import side_for, small
from headwater.dashboard.parts.job import wait
from headwater.dashboard.running import effects, measure, models, runs, scores
from headwater.dashboard.running.jobs import Lane
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain as plain_text
from headwater.lens.errors import HeadwaterError

BRIEF = {"ablation": "without it", "mean": "at its mean", "gradient": "by gradient", "direct": "directly"}
WORK = {
    "ablation": "effect of each head",
    "mean": "effect of each head at its mean",
    "gradient": "effects by gradient",
    "direct": "what each head writes directly",
}


def found(
    state: State, run: Run, names: Sequence[str], over: str = ""
) -> dict[str, xr.DataArray | xr.Dataset]:
    """The scores of a run by name, those that are there. Those under way say so where this is called.

    Effects are a Dataset of `effect`, `low`, `high`, over the prompt set `over` where one is named; roles come
    all at once, as "roles".
    """
    there: dict[str, xr.DataArray | xr.Dataset] = {}
    offered = scores.offered(run, measure.of(state, runs.a(state)), has_roles(run))
    for name in names:
        if name in offered and offered[name].source == "record":
            there[name] = scores.of_record(name, run)
        elif name in offered and offered[name].source == "effect":
            effect = _effect(state, run, name, over)
            if isinstance(effect, str):
                st.caption(plain_text(f"No effect {BRIEF[name]}: {effect}"))
            elif effect is not None:
                there[name] = effect
    if any(name == "roles" or name.startswith("role_") for name in names) and has_roles(run):
        roles = roles_of(state, run)
        if roles is not None:
            there["roles"] = roles
            there |= {
                name: roles.sel(role=name.removeprefix("role_"), drop=True)
                for name in names if name.startswith("role_")
            }  # fmt: skip
    return there


def has_roles(run: Run) -> bool:
    if run.of_record:
        return False
    model = models.resident(run.name)
    texts = model.causal and model.tokenizer is not None and run.similarity is None
    return texts and not model.is_encoder_decoder and not run.part


def plain(score: xr.DataArray | xr.Dataset) -> xr.DataArray:
    """One number per head, [layer, head]."""
    return score["effect"] if isinstance(score, xr.Dataset) else score


def _effect(state: State, run: Run, how: str, over: str) -> xr.Dataset | str | None:
    """The effect; as a text the reason why there is none."""
    first = runs.a(state)
    chosen = measure.of(state, first)
    model, of = runs.model_of(state, run), chosen.key

    def work() -> xr.Dataset | str:
        try:
            asked = effects.of_set(model, over, chosen) if over else effects.of_prompt(run, chosen)
            with runs.editing(run):
                return effects.effect(model, how, asked)
        except HeadwaterError as error:
            return str(error)

    key = ("head effects", how, over, of, run.identity)
    lane: Lane = "light" if how in ("gradient", "direct") and not over else "long"
    return wait(key, work, WORK[how] + _side(run, first), model=run.name, lane=lane)


def roles_of(state: State, run: Run) -> xr.DataArray | None:
    """How far each head of a run does each simple job, [layer, head, role]."""
    model = runs.model_of(state, run)

    def work() -> xr.DataArray:
        with runs.editing(run):
            return entry("head_roles").function(model)

    return wait(
        ("head roles", run.name, run.edits),
        work,
        "roles of heads" + _side(run, runs.a(state)),
        model=run.name,
    )


def curve(state: State, run: Run, over: str) -> xr.Dataset | None:
    """The measure while heads are removed."""
    first = runs.a(state)
    chosen = measure.of(state, first)
    model = runs.model_of(state, run)

    def work() -> xr.Dataset:
        asked = effects.of_set(model, over, chosen) if over else effects.of_prompt(run, chosen)
        with runs.editing(run):
            return effects.pruned(model, asked)

    of = chosen.key
    key = ("pruning curve", over, of, run.identity)
    return wait(key, work, "pruning curve" + _side(run, first), model=run.name)


def maps(state: State, run: Run) -> dict[tuple[int, int], np.ndarray] | None:
    """All maps of a run as small pictures."""
    side = side_for(len(run.layers) * run.n_heads)

    def work() -> dict[tuple[int, int], np.ndarray]:
        made = {}
        for layer in run.layers:
            map = run.record.map(layer)
            block = max(1, -(-max(map.shape[2:]) // side))
            for head, weights in enumerate(map.pooled(block)[0].float().cpu().numpy()):
                made[layer, head] = small(weights, side, causal=run.causal)
        return made

    return wait(
        ("small maps", run.identity),
        work,
        "maps of all heads" + _side(run, runs.a(state)),
        model=run.name,
        lane="light",
    )


def _side(run: Run, first: Run) -> str:
    return "" if run is first else " in run B"


def ranked(there: Mapping[str, xr.DataArray | xr.Dataset], run: Run) -> pd.DataFrame:
    """One line per head, the largest first effect first: effects with their bounds, share on the sink, role."""
    layers, heads = np.meshgrid(run.layers, np.arange(run.n_heads), indexing="ij")
    columns: dict[str, Any] = {
        "head": [f"{layer}.{head}" for layer, head in zip(layers.flat, heads.flat, strict=True)]
    }
    effect = [name for name in BRIEF if name in there]
    for name in effect:
        of = there[name]
        columns[name] = plain(of).transpose("layer", "head").values.ravel()
        if isinstance(of, xr.Dataset) and of.attrs["examples"] > 1:
            columns |= {f"{name} {end}": of[end].values.ravel() for end in ("low", "high")}
    if "sink" in there:
        columns["sink"] = plain(there["sink"]).transpose("layer", "head").values.ravel()
    roles = there.get("roles")
    if isinstance(roles, xr.DataArray):
        columns["role"] = scores.role_names(roles).ravel()
    frame = pd.DataFrame(columns)
    by = (
        frame[effect[0]].abs()
        if effect
        else frame["sink"]
        if "sink" in frame
        else pd.Series(np.zeros(len(frame)))
    )
    return frame.iloc[np.argsort(-by.to_numpy(), kind="stable")].reset_index(drop=True)


def agree(there: Mapping[str, xr.DataArray | xr.Dataset]) -> str:
    """How far the ways of asking for an effect rank the heads alike, in a sentence; nothing where there is one way."""
    columns = {name: plain(there[name]).transpose("layer", "head").values for name in BRIEF if name in there}
    if len(columns) < 2:
        return ""
    found = effects.agreement(columns)
    names = list(columns)
    said = [
        f"{BRIEF[one]} – {BRIEF[other]} {value:.2f}"
        for n, one in enumerate(names) for other in names[n + 1 :]
        if np.isfinite(value := float(found.sel(one=one, other=other)))
    ]  # fmt: skip
    flat = [BRIEF[name] for name in names if np.isnan(found.sel(one=name, other=name))]
    if flat:
        said.append(f"no order of effects that are the same for every head ({', '.join(flat)})")
    return f"Rank agreement (Spearman): {'; '.join(said)}." if said else ""
