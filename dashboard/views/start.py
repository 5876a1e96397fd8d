"""Start: three questions about the model and its input, each with its answer at a glance."""

import streamlit as st

from headwater.dashboard.parts import cards
from headwater.dashboard.running import measure, models, runs
from headwater.dashboard.state import session

state = session.current()
run = runs.a(state)
chosen = measure.of(state, run)

st.header("Where to begin")
st.caption(cards.fits(models.resident(state.model), chosen))
for column, card in zip(st.columns(3, gap="medium"), (cards.heads, cards.sinks, cards.edit), strict=True):
    with column, st.container(border=True):
        card(state, run, chosen)
cards.own_model()
cards.recent(state)
