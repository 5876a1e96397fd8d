"""Flow: from which tokens an answer comes, by several methods side by side, and whether they can be believed."""

import streamlit as st

from headwater.dashboard.parts import flows as parts
from headwater.dashboard.running import measure, runs
from headwater.dashboard.running.compare import aligned
from headwater.dashboard.state import session
from headwater.dashboard.widgets import plain, quoted

state = session.current()
run = runs.shown(state)
chosen = measure.of(state, runs.a(state))

st.header("Flow")
query, methods, settings = parts.choose(state, run)
rows, whole = parts.rows_of(state, run, chosen, methods, query, settings, "B" if state.shown == "b" else "A")
other, second = None, runs.b(state) if state.shown == "difference" else None
if second is not None:
    there = aligned(run.queries, second.queries).to_b(query)
    if there is not None:
        other, _ = parts.rows_of(state, second, chosen, methods, there, settings, "B")
        if (run.queries, run.keys) != (second.queries, second.keys):
            st.caption(
                "B and B − A stand at the tokens of A to which those of B belong; what B lacks is empty."
            )
    else:
        st.info(plain(f"Run B has no token that belongs to {quoted(run.queries[query])}: this is run A."))
if not methods:
    st.caption("Choose a method.")
elif rows:
    parts.draw_strips(state, run, rows, query, other)
    parts.draw_methods(methods)
    parts.draw_pictures(state, run, rows, query)
    if whole:
        parts.draw_belief(state, run, chosen, rows)
parts.draw_paths(state, run, query, settings)
