"""Records in the place of a model: uploading one, what it is of, what needs its model, and the way to that."""

from __future__ import annotations

import streamlit as st

from headwater.dashboard.running import models
from headwater.dashboard.state import own_records, session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError

OWN, TAKEN = (
    "own-records",
    "own-record-taken",
)  # of a session: its uploads by name; the last file and its fault


def offered(state: State) -> list[str]:
    """What the session can look at: what is offered to all, and the records that it uploaded or was linked to."""
    named = [name for name in (state.model, state.b_model) if name is not None and own_records.path(name)]
    own = [name for name in st.session_state.get(OWN, []) if own_records.path(name)]
    return list(dict.fromkeys([*models.offered(), *own, *named]))


def shown(name: str) -> str:
    """A model or record as a list shows it: of an upload its model too."""
    called = models.called(name)
    return name if called == name else f"{called} (of {models.model_of_record(name) or 'an unnamed model'})"


def draw_upload(state: State) -> None:
    """A place to open a record of one's own."""
    with st.expander("A record of your own"):
        st.markdown(
            "`headwater record` and `record.save` write one: attention of a run, which opens here without its model. "
            "It is kept on this machine under its digest, which its link holds, and shown to nobody without it."
        )
        given = st.file_uploader(
            "A record", list(own_records.KINDS), key="own-record", max_upload_size=own_records.MOST_MEGABYTES
        )
        # a chosen file stays in its field: it is taken once, and what is wrong with it stays told
        taken, fault = st.session_state.get(TAKEN, ("", ""))
        if given is None:
            return
        if given.file_id != taken:
            try:
                name, fault = own_records.take(given.getvalue()), ""
            except HeadwaterError as error:
                name, fault = "", str(error)
            st.session_state[TAKEN] = given.file_id, fault
            if name:
                st.session_state[OWN] = list(dict.fromkeys([*st.session_state.get(OWN, []), name]))
                vars(state).update(vars(State(name)))
                session.again()
        if fault:
            st.error(plain(fault))


def draw_about(name: str) -> None:
    """Of which model and text it is, and what it can not say; once, where it is begun with."""
    found = models.record(name)
    edits = found.provenance.get("edits") or []
    count = len(found.strings)
    told = f"{models.called(name)} is the record of a run of {models.model_of_record(name) or 'an unnamed model'}"
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
    told = f"{what[:1].upper()}{what[1:]}: that needs the model, and {models.called(name)} is the record of a run."
    st.info(plain(told))
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
