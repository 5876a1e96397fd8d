"""Sinks: where attention drains, by which rules, what is carried there, and what redistributing it would be."""

import streamlit as st

from headwater.dashboard.parts import records, sinks as parts
from headwater.dashboard.parts.reading import same_heads
from headwater.dashboard.running import runs, sinks
from headwater.dashboard.running.compare import aligned
from headwater.dashboard.state import session

state = session.current()
run = runs.shown(state)

st.header("Sinks")
st.caption(
    "A sink is a token that gets far more attention than its content explains, most often the first one."
)
found = sinks.shares(run)
other, second = None, runs.b(state) if state.shown == "difference" else None
if second is not None:
    if same_heads(run, second):
        other = sinks.shares(second).at(aligned(run.keys, second.keys).pairs, len(run.keys))
        told = "The map and the heads show the change from run A to run B; what is below is of run A."
        if run.keys != second.keys:
            told += " It stands at the tokens of A to which those of B belong; what B lacks is hatched."
        st.caption(told)
    else:
        st.info("Run B has other heads, so that it can not be taken from run A: this is run A.")
keys, limit, least = parts.choose(state, run, found)
parts.draw_map(state, run, found, other, keys, limit, least)
parts.draw_heads(state, run, found, other, keys, limit)
parts.draw_recorded(state, run, found, keys, limit, least)
if run.of_record:
    records.draw_needs(run.name, "what the sink carries, and the sink over generated text")
else:
    parts.draw_contribution(state, run, keys)
    parts.draw_generated(state, run, keys)
parts.draw_family(state)
