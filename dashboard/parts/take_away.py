"""An edited run to take away, as Python or as an experiment, and an experiment brought back."""

from __future__ import annotations

import streamlit as st

from headwater.dashboard.export import experiment
from headwater.dashboard.export.python import as_python
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.state import session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError


def draw(state: State, measure: Measure) -> None:
    st.subheader("Take it away")
    if state.applied():
        st.caption("Python that repeats both runs; the button at its corner copies it.")
        st.code(as_python(state, measure), language="python")
        try:
            content = experiment.as_experiment(state, measure).to_json()
            st.download_button(
                "Download the experiment", content, "experiment.json", "application/json", key="experiment-json",
                on_click="ignore",
            )  # fmt: skip
            st.caption(
                "headwater experiment experiment.json runs it again and says whether the numbers agree."
            )
        except HeadwaterError as error:
            st.caption(plain(f"No experiment file: {error}."))
    given = st.file_uploader("Open an experiment", "json", key="experiment-file")
    # a chosen file stays in its field: it is taken once
    if given is not None and st.session_state.get("experiment-taken") != given.file_id:
        st.session_state["experiment-taken"] = given.file_id
        try:
            experiment.take(given.getvalue().decode("utf-8-sig", "replace"), state)
        except HeadwaterError as error:
            st.error(plain(str(error)))
            return
        session.again()
