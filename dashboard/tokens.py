"""Choosing a token of the prompt: from a list, or by a click on the prompt as a strip of coloured tokens."""

from __future__ import annotations

import numpy as np
import streamlit as st

from headwater.dashboard.figures.tokens import MOST_IN_A_STRIP, token_strip
from headwater.dashboard.runs import Run
from headwater.dashboard.state import State
from headwater.dashboard.widgets import clicked, select, token_name


def choose_token(run: Run, state: State) -> int:
    """The token looked at, on every page; to begin with, the last of the prompt."""
    shown = run.length - 1 if state.token is None else min(state.token, run.length - 1)
    chosen = select(
        "Token", range(run.length), shown, "chosen-token", lambda place: token_name(run.tokens, place)
    )
    if chosen != shown:
        state.token = chosen
    return chosen


def draw_strip(
    values: np.ndarray,
    run: Run,
    state: State,
    title: str,
    unit: str,
    limits: tuple[float, float] | None,
    key: str,
) -> None:
    """The prompt coloured by ``values``; a click on a token chooses it. Prompts too long for a strip have none."""
    if run.length > MOST_IN_A_STRIP:
        return
    position = min(state.token if state.token is not None else run.length - 1, run.length - 1)
    figure = token_strip(values, run.tokens, title, unit, limits, position, "click a token to choose it")
    point = clicked(figure, key, f"{unit.capitalize()} of each token for token {position}")
    if point:
        state.token = int(point["customdata"])
        st.rerun()
