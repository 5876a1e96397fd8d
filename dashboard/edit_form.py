"""Inputs for one edit of attention or heads, and the edit they describe."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

import headwater as hw
from headwater.dashboard.runs import Run
from headwater.dashboard.widgets import token_name
from headwater.lens.edits import Edit


def heads_input(model: hw.HookedModel, key: str, needed: bool) -> list[str] | str:
    """Heads by name; where they may be left out, none means all."""
    names = [str(hw.Head(layer, head)) for layer in model.layers for head in range(model.n_heads)]
    chosen = st.multiselect("Heads", names, key=key, placeholder="choose heads" if needed else "all heads")
    return chosen if chosen or needed else "all"


def tokens_input(label: str, run: Run, key: str, default: list[int] | None = None) -> list[int]:
    return st.multiselect(
        label,
        range(run.length),
        default=default,
        key=f"{key}-{run.length}",
        format_func=lambda position: token_name(run.tokens, position),
        placeholder="choose tokens",
    )


def redistribute(model: hw.HookedModel, run: Run) -> hw.Redistribute | None:
    keys = tokens_input("Take weight from", run, "redistribute-keys", [0])
    keep = st.slider("Share that stays there", 0.0, 1.0, 0.4, 0.05, key="redistribute-keep")
    to = tokens_input("Hand it to (none: all other tokens)", run, "redistribute-to")
    heads = heads_input(model, "redistribute-heads", needed=False)
    return hw.Redistribute(keys=keys, keep=keep, to=to or "others", heads=heads) if keys else None


def knockout(model: hw.HookedModel, run: Run) -> hw.Knockout | None:
    queries = tokens_input("Tokens that must not look", run, "knockout-queries", [run.length - 1])
    keys = tokens_input("at these tokens", run, "knockout-keys")
    heads = heads_input(model, "knockout-heads", needed=False)
    return hw.Knockout(queries=queries, keys=keys, heads=heads) if queries and keys else None


def scale(model: hw.HookedModel, run: Run) -> hw.ScaleHeads | None:
    heads = heads_input(model, "scale-heads", needed=True)
    factor = st.slider("Multiply their output by", 0.0, 3.0, 0.5, 0.05, key="scale-factor")
    return hw.ScaleHeads(dict.fromkeys(heads, factor)) if heads else None


def ablate(model: hw.HookedModel, run: Run) -> hw.AblateHeads | None:
    heads = heads_input(model, "ablate-heads", needed=True)
    return hw.AblateHeads(heads, ablation="zero") if heads else None


def toward_identity(model: hw.HookedModel, run: Run) -> hw.TowardIdentity:
    amount = st.slider(
        "Move attention toward the token itself by", 0.0, 1.0, 0.5, 0.05, key="identity-amount"
    )
    return hw.TowardIdentity(amount, heads=heads_input(model, "identity-heads", needed=False))


def temperature(model: hw.HookedModel, run: Run) -> hw.Temperature:
    tau = st.slider(
        "Multiply attention scores by",
        0.1,
        5.0,
        2.0,
        0.1,
        key="temperature-tau",
        help="above 1 attention sharpens, below 1 it spreads",
    )
    return hw.Temperature(tau, heads=heads_input(model, "temperature-heads", needed=False))


Inputs = Callable[[hw.HookedModel, Run], Edit | None]
KINDS: dict[str, tuple[str, str, Inputs]] = {
    "Redistribute": (
        "Redistribute attention",
        "Takes weight from some tokens and hands it to others.",
        redistribute,
    ),
    "Knockout": ("Knock out attention", "Some tokens can no longer look at others.", knockout),
    "ScaleHeads": ("Scale heads", "Makes the output of heads stronger or weaker.", scale),
    "AblateHeads": ("Ablate heads", "Removes the output of heads: zero takes its place.", ablate),
    "TowardIdentity": (
        "Move attention to the token itself",
        "Mixes each row with the token's own place.",
        toward_identity,
    ),
    "Temperature": ("Sharpen or spread attention", "Multiplies the scores before the softmax.", temperature),
}


def draw(model: hw.HookedModel, run: Run) -> Edit | None:
    """The inputs of the chosen kind; gives the edit once the button is pressed."""
    kind = st.selectbox("Edit", list(KINDS), format_func=lambda name: KINDS[name][0], key="edit-kind")
    _, meaning, inputs = KINDS[kind]
    st.caption(meaning)
    edit = inputs(model, run)
    pressed = st.button("Add this edit", type="primary", disabled=edit is None, key="add-edit")
    return edit if pressed else None
