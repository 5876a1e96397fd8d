"""What is said where a record is looked at: what it is of, what needs its model, and the way to that."""

from __future__ import annotations

import streamlit as st

from headwater.dashboard.running import models
from headwater.dashboard.state import session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain


def draw_about(name: str) -> None:
    """Of which model and text it is, and what it can not say; once, where it is begun with."""
    found = models.record(name)
    edits = found.provenance.get("edits") or []
    count = len(found.strings)
    told = f"{name} is the record of a run of {models.model_of_record(name) or 'an unnamed model'}"
    told += f" with {len(edits)} edits" if isinstance(edits, list) and edits else ""
    told += f"; of its {count} texts the first is shown" if count > 1 else ""
    st.caption(
        plain(
            f"{told}. It holds attention and no answers: nothing is measured, and what runs the model (effects, edits, "
            "circuits, experiments) is left out."
        )
    )


def draw_needs(name: str, what: str) -> None:
    """One line for what needs the model of the record `name`, and a button that opens it where it is offered."""
    model = models.model_of_record(name)
    st.info(plain(f"{what[:1].upper()}{what[1:]}: that needs the model, and {name} is the record of a run."))
    if models.offered_model_of(name) is not None:
        st.button(
            plain(f"Open {model}"),
            key="open-the-model",
            on_click=_open,
            args=(model,),
            icon=":material/open_in_new:",
        )
    elif model:
        st.caption(plain(f"Start with it to have it here: headwater dashboard {model} {models.source(name)}"))


def _open(model: str) -> None:
    state = session.current()
    vars(state).update(vars(State(model)))
    session.touch()
