"""Catalogue: every analysis by its question, run from a form on the input of the page."""

import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard.parts import catalogue as parts
from headwater.dashboard.running import measure, runs
from headwater.dashboard.running.catalogue import is_known
from headwater.dashboard.state import session

state = session.current()
first = runs.a(state)
run = runs.shown(state)

st.header("Catalogue")
if state.shown == "difference":
    st.info("Analyses run on one run; this is run A.")
name = state.get(parts.CHOSEN)
if name is not None and not is_known(name):
    state.notices.append(f"No analysis is called {str(name)[:60]!r}.")
    name = None
if name is None:
    parts.draw_list(state, run.of_record)
else:
    parts.draw_entry(state, run, measure.of(state, first), entry(str(name)))
parts.draw_pins(state)
