"""Flow: from which tokens an answer comes, by several methods side by side, and whether they can be believed."""

import streamlit as st

from headwater.dashboard.parts import flows as parts
from headwater.dashboard.parts.reading import same_tokens
from headwater.dashboard.running import measure, runs
from headwater.dashboard.state import session

state = session.current()
run = runs.shown(state)
chosen = measure.of(state, runs.a(state))

st.header("Flow")
query, methods, settings = parts.choose(state, run)
rows, whole = parts.rows_of(state, run, chosen, methods, query, settings, "B" if state.shown == "b" else "A")
other, second = None, runs.b(state) if state.shown == "difference" else None
if second is not None:
    if same_tokens(run, second):
        other, _ = parts.rows_of(state, second, chosen, methods, query, settings, "B")
    else:
        st.info("Run B has other tokens, so that it can not be taken from run A: this is run A.")
if not methods:
    st.caption("Choose a method.")
elif rows:
    parts.draw_strips(state, run, rows, query, other)
    parts.draw_methods(methods)
    parts.draw_pictures(state, run, rows, query)
    if whole:
        parts.draw_belief(state, run, chosen, rows)
parts.draw_paths(state, run, query, settings)
