"""The list of edits in words: each with a switch, its strength, its place in the order, and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import streamlit as st

import headwater as hw
from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.parts.edits import told
from headwater.dashboard.running import runs
from headwater.dashboard.running.edit_kinds import Strength, positions_in, strength, with_strength
from headwater.dashboard.running.made_edits import unfit
from headwater.dashboard.state import session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError

SAID = {
    "keep": "share that stays",
    "factor": "factor",
    "amount": "amount",
    "tau": "scores ×",
    "bias": "added to scores",
}
MEANT = "edit.meant"  # the tokens that the positions of the edits meant when they were made


def draw(state: State, model: hw.HookedModel) -> None:
    st.markdown("**Edits of run B**")
    if not state.edits:
        st.info("None yet. Add one, and everything below shows run A, as it is, beside run B, edited.")
        state.settings.pop(MEANT, None)
        return
    _tell_changed_tokens(state)
    for place, edit in enumerate(state.edits):
        _one(state, place, edit, model)
    if len(state.edits) > 1:
        st.button("Remove all", key="remove-all", on_click=_change, args=(lambda s: s.edits.clear(),))


def _one(state: State, place: int, edit: dict, model: hw.HookedModel) -> None:
    on = not edit.get("off")
    with st.container(key=f"edit-row-{place}", border=True, gap="small"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            key = f"edit-on-{place}"
            st.session_state[key] = on
            st.toggle(
                f"Edit {place + 1} is on", key=key, label_visibility="collapsed", on_change=_switch, args=(place, key)
            )  # fmt: skip
            words = plain(told(state, edit))
            st.markdown(words if on else f":gray[{words}]", width="stretch")
            for name, icon, step in (("up", "arrow_upward", -1), ("down", "arrow_downward", 1)):
                if len(state.edits) > 1:
                    st.button(
                        "", icon=f":material/{icon}:", key=f"{name}-{place}", help=f"Move edit {place + 1} {name}",
                        disabled=not 0 <= place + step < len(state.edits), on_click=_move, args=(place, place + step),
                    )  # fmt: skip
            st.button(
                "", icon=":material/close:", key=f"remove-{place}", help=f"Remove edit {place + 1}",
                on_click=_change, args=(lambda s: s.edits.pop(place),),
            )  # fmt: skip
        if on and (why := _why_unfit(model.name, json.dumps(edit, sort_keys=True), model)):
            st.error(plain(why))
        elif on and (number := strength(edit)) is not None:
            _slider(place, number)


@st.cache_data(max_entries=256, show_spinner=False)
def _why_unfit(name: str, edit: str, _model: hw.HookedModel) -> str:
    return unfit(json.loads(edit), _model)


def _slider(place: int, number: Strength) -> None:
    key = f"strength-{place}"
    st.session_state[key] = number.value
    st.slider(
        f"Edit {place + 1}: {SAID[number.field]}", number.low, number.high, step=number.step, key=key,
        on_change=_set_strength, args=(place, key),
    )  # fmt: skip


def _tell_changed_tokens(state: State) -> None:
    """Say which positions of the edits mean other tokens than when the edits were made."""
    places = sorted(
        {(str(edit.get("part", "")), place) for edit in state.edits for place in positions_in(edit)}
    )
    known = [each for each in state.listed(MEANT) if isinstance(each, list) and len(each) == 3]
    meant = {
        (each[0], each[1]): each[2] for each in known if isinstance(each[0], str) and isinstance(each[1], int)
    }
    tokens: dict[tuple[str, int], str] = {}
    for part in {part for part, _ in places}:
        with suppress(HeadwaterError):  # a part that the model lacks, which the edit itself says
            keys = runs.keys_of(state, part)
            tokens |= {(part, n - back): token for n, token in enumerate(keys) for back in (0, len(keys))}
    changed = [p for p in places if p in meant and tokens.get(p) != meant[p]]
    if places:
        state.put(MEANT, [[*p, meant.get(p, tokens.get(p, ""))] for p in places])
    else:
        state.settings.pop(MEANT, None)
    if not changed:
        return
    words = [
        f"position {p[1]} was {_quoted(meant[p])} and is now {_quoted(tokens[p]) if p in tokens else 'beyond the end'}"
        for p in changed
    ]
    st.warning(plain(f"The text has changed: {'; '.join(words)}."))
    st.button(
        "The edits are meant so", key="meant", on_click=_change, args=(lambda s: s.settings.pop(MEANT, None),)
    )


def _quoted(token: Any) -> str:
    return f"‹{cut(visible(str(token)), 14)}›"


def _change(work: Callable[[State], Any]) -> None:
    state = session.current()
    work(state)
    if not state.edits and state.b_text is None and state.b_model is None:
        state.shown = "a"
    session.touch()


def _switch(place: int, key: str) -> None:
    def work(state: State) -> None:
        edit = {name: value for name, value in state.edits[place].items() if name != "off"}
        state.edits[place] = edit if st.session_state[key] else {**edit, "off": True}

    _change(work)


def _move(place: int, to: int) -> None:
    def work(state: State) -> None:
        state.edits.insert(to, state.edits.pop(place))

    _change(work)


def _set_strength(place: int, key: str) -> None:
    def work(state: State) -> None:
        state.edits[place] = with_strength(state.edits[place], float(st.session_state[key]))

    _change(work)
