"""Heads for an edit: all, the chosen one, the pinned ones, whole layers, or by name and on a grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st
import xarray as xr

import headwater as hw
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import clicked

WAYS = {
    "all": "all heads",
    "chosen": "the chosen head",
    "pinned": "the pinned heads",
    "layers": "whole layers",
    "named": "heads by name or on a grid",
}


def heads_input(state: State, model: hw.HookedModel, needed: bool) -> dict[str, Any]:
    """The fields heads or layers of an edit; empty where nothing is chosen yet. `needed`: not all heads at once."""
    pinned = pinned_heads(state, model)
    ways = [each for each in WAYS if (each != "all" or not needed) and (each != "pinned" or pinned)]
    way = bound.choice(
        state, "edit.needed_by" if needed else "edit.heads_by", "Heads", ways, ways[0],
        show=lambda each: f"head {state.layer}.{state.head}, the chosen one" if each == "chosen" else WAYS[each],
    )  # fmt: skip
    if way == "all":
        return {"heads": "all"}
    if way == "chosen":
        return {"heads": [f"{state.layer}.{state.head}"]}
    if way == "pinned":
        st.caption(", ".join(pinned))
        return {"heads": pinned}
    if way == "layers":
        layers = bound.chips(state, "edit.layers", "Layers", model.layers)
        heads = [str(hw.Head(layer, head)) for layer in layers for head in range(model.n_heads)]
        return {"heads": heads} if needed and heads else {"layers": layers} if layers else {}
    names = [str(hw.Head(layer, head)) for layer in model.layers for head in range(model.n_heads)]
    chosen = bound.several(state, "edit.heads", "Names", names, placeholder="choose heads")
    with st.popover("Choose on a grid", icon=":material/grid_view:"):
        _grid(state, model, chosen)
    return {"heads": chosen} if chosen else {}


def layers_input(state: State, model: hw.HookedModel) -> dict[str, Any]:
    """The field layers of an edit; none chosen means all."""
    layers = bound.chips(state, "edit.layers", "Layers (none: all)", model.layers)
    return {"layers": layers or "all"}


def pinned_heads(state: State, model: hw.HookedModel) -> list[str]:
    """The pinned heads that the model has, without edges."""
    found = [hw.Head.parse(name) for name in state.pins if ">" not in name]
    return [str(each) for each in found if each.layer in model.layers and each.head < model.n_heads]


def _grid(state: State, model: hw.HookedModel, chosen: list[str]) -> None:
    taken = np.zeros((model.n_layers, model.n_heads))
    for name in chosen:
        layer, head = hw.Head.parse(name)
        taken[model.layers.index(layer), head] = 1
    values = xr.DataArray(
        taken, dims=("layer", "head"), coords={"layer": list(model.layers), "head": range(model.n_heads)}
    )
    figure = head_grid(values, "Click heads to take them or leave them", "taken", limits=(0.0, 1.0))
    point = clicked(figure, "edit-heads-grid", f"Heads taken: {', '.join(chosen) or 'none'}")
    if point is not None:
        name = f"{point['y']}.{point['x']}"
        state.put(
            "edit.heads", [each for each in chosen if each != name] if name in chosen else [*chosen, name]
        )
        session.again()
