"""Flow: from which input tokens a clicked token draws, when attention is followed down through the layers."""

import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard import export, runs
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.tokens import token_bars
from headwater.dashboard.state import KEY, State
from headwater.dashboard.tokens import choose_token, draw_strip
from headwater.dashboard.widgets import chart, numbers, quoted, settings

state: State = st.session_state[KEY]
run = runs.base_run(state.model, state.prompt)
rollout = entry("rollout")

st.header("Flow")
st.caption(
    "Attention rollout: the mean attention of each layer, mixed with the residual stream, multiplied from the "
    "last layer down to the input. It follows attention alone; what values and MLPs do is left out."
)
token, inputs = st.columns([1, 3])
with token:
    position = choose_token(run, state)
with inputs:
    chosen = settings(rollout, ["residual", "heads", "add_residual", "without"], "rollout")
with st.spinner("Following attention down the layers …"):
    shares = rollout.function(run.record, queries=[position], **chosen).isel(batch=0, query=0)
for told in ("one_token", "set_aside"):
    if told in shares.attrs:
        # plain text: tokens may hold what Markdown reads
        st.text(f"{told.replace('_', ' ').capitalize()}: {shares.attrs[told]}")
values = shares.values
name = f"{quoted(run.tokens[position])} (token {position})"
draw_strip(values, run, state, escaped(f"Where {name} comes from"), "share", None, "flow")
title = escaped(f"Share of each input token in {name}")
bars = token_bars(values, run.tokens, title, "share", subtitle="the shares sum to 1")
chart(bars, "flow-bars", f"Share of each input token in position {position}, as bars")
numbers("flow", export.per_token(values, run.tokens, "share"), "flow-numbers")
