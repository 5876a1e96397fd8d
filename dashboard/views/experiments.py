"""Experiments: save this view, see what was saved, run it again, take it away, open a file."""

import streamlit as st

from headwater.dashboard.parts import records, saved as parts
from headwater.dashboard.running.models import is_record
from headwater.dashboard.state import session

state = session.current()
st.header("Experiments")
left, right = st.columns(2, gap="large")
with left:
    if is_record(state.model):
        records.draw_needs(state.model, "an experiment, a report, and Python that repeats the view")
    else:
        parts.draw_save(state)
with right:
    parts.draw_open(state)
parts.draw_table(state)
