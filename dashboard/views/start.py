"""Start: three questions about the model and its input, each with its answer at a glance."""

import streamlit as st

from headwater.dashboard.parts import cards, records
from headwater.dashboard.running import measure, models, runs
from headwater.dashboard.state import session

state = session.current()
run = runs.a(state)
chosen = measure.of(state, run)

st.header("Where to begin")
if run.of_record:
    records.draw_about(run.name)
    with st.columns(2, gap="medium")[0], st.container(border=True):
        cards.sinks(state, run, chosen)
    records.draw_needs(run.name, "what each head is worth and what changes without the sink")
else:
    st.caption(cards.fits(models.resident(state.model), chosen))
    shown = (cards.heads, cards.sinks, cards.edit)
    for column, card in zip(st.columns(3, gap="medium"), shown, strict=True):
        with column, st.container(border=True):
            card(state, run, chosen)
cards.own_model()
records.draw_upload(state)
cards.recent(state)
