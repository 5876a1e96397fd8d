"""Choosing one token of the input: from a list, or by its position where a list would be too long to send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from headwater.dashboard.state import bound
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain, token_name

MOST_LISTED = 512
MOST_FOUND = 8


def choose_token(
    state: State, name: str, label: str, tokens: Sequence[str], default: int, **more: Any
) -> int:
    """The position that the state has under `name`, within the tokens; `default` where it has none."""
    last = len(tokens) - 1
    shown = state.get(name)
    shown = (
        min(shown, last) if isinstance(shown, int) and not isinstance(shown, bool) and shown >= 0 else default
    )
    if len(tokens) <= MOST_LISTED:
        places = list(range(len(tokens)))
        bound.choice(state, name, label, places, shown, show=lambda n: token_name(tokens, n), **more)
        return shown
    place = int(bound.number(state, name, f"{label}, position", 0, last, shown, 1, **more))
    word = bound.text(state, "input.find", "Find a token", placeholder="its text")
    if word:
        found = [n for n, token in enumerate(tokens) if word.strip() and word.strip() in token]
        listed = ", ".join(str(n) for n in found[:MOST_FOUND]) or "nowhere"
        more_found = f" and {len(found) - MOST_FOUND} more" if len(found) > MOST_FOUND else ""
        st.caption(plain(f"{word.strip()!r} stands at {listed}{more_found}"))
    st.caption(plain(token_name(tokens, place)))
    return place
