"""The state of the session that a page is drawn for, in step with the address of the browser.

The session writes the address when its state changes; each such change is an entry of the browser's history. An address
that the session did not write, after Back, Forward or a link typed in, is read, and its state takes the place of the
session's.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from headwater.dashboard.state.address import CheckEdits, from_address, to_address
from headwater.dashboard.state.state import State

KEY = "headwater"
_SEEN, _MEANT, _TOUCHED = "headwater-address", "headwater-meant", "headwater-touched"
_TOLD = "headwater-told"  # (page, notices above it)


def begin(models: Sequence[str], check_edits: CheckEdits) -> State:
    """The state at the start of a run of the script; read from the address where the session did not write that."""
    address = st.query_params.to_dict()
    moved = st.session_state.get(_SEEN) != address
    # a change made in the page came with the address of the moment before, which may not have reached the browser
    touched = st.session_state.get(_TOUCHED, False)
    if moved or touched:
        st.session_state.pop(_TOLD, None)
    if KEY not in st.session_state or (moved and not touched):
        state = from_address(address, models, check_edits)
        st.session_state[KEY], st.session_state[_SEEN] = state, address
        st.session_state[_MEANT] = to_address(state)
    st.session_state[_TOUCHED] = False
    return st.session_state[KEY]


def current() -> State:
    return st.session_state[KEY]


def told(page: str) -> list[str]:
    """The notices that stand above a page since the person last did something; more can be added."""
    if st.session_state.get(_TOLD, ("",))[0] != page:
        st.session_state[_TOLD] = page, []
    return st.session_state[_TOLD][1]


def touch() -> None:
    """Say that the state was changed by the person at the page, so that it wins over the address."""
    st.session_state[_TOUCHED] = True


def write(state: State) -> None:
    """Bring the address in step with the state; nothing where the state has not changed since it was read."""
    wanted = to_address(state)
    if wanted != st.session_state.get(_MEANT):
        st.query_params.from_dict(wanted)
        st.session_state[_SEEN] = st.session_state[_MEANT] = wanted


def again() -> None:
    """Draw the page anew, after the state was changed in the middle of a run."""
    touch()
    st.rerun()
