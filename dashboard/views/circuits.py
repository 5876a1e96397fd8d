"""Circuits: which heads work together, how much of the answer they carry, and what an edge is worth."""

import streamlit as st

from headwater.dashboard.parts import circuit_curve, circuit_edge, circuits as parts, records
from headwater.dashboard.running import measure, runs
from headwater.dashboard.state import session
from headwater.dashboard.widgets import plain

state = session.current()
plain_run = runs.a(state)
run = runs.shown(state)
chosen = measure.of(state, plain_run)

st.header("Circuits")
if run.of_record:
    records.draw_needs(run.name, "which heads work together")
    st.stop()
if state.shown == "difference":
    st.info("Two circuits are compared below, under Overlap; this is run A.")
method, query = parts.choose_method(state, run)
if chosen.kind == "loss":
    st.info("Circuits explain an answer, and the measure is a loss; choose another measure at the top.")
other = None
if method == "edges" and chosen.kind != "loss":
    other = parts.choose_corrupt(state, chosen)
found = None
if method != "edges" or chosen.kind != "loss":
    found = parts.circuit(state, run, chosen, method, query, other)
if found is not None:
    st.caption(plain(f"Scores are of {chosen.label}." if method == "edges" else "Weights are of no answer."))
    edges = parts.draw_graph(state, run, found, method)
    if len(edges):
        circuit_edge.draw_edge(state, run, chosen, edges, other)
        parts.draw_nodes(state, edges)
        if method == "edges" and other is not None:
            steps, size = parts.steps_of(state), len(edges)
            circuit_curve.draw_again(state, run, chosen, found, other, steps, size)
            parts.draw_faithfulness(state, run, chosen, found, other)
        parts.draw_overlap(state, run, chosen, found, method, query, other)
