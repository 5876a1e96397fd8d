"""Edit: change attention or heads, and see what became of the measure, the answers and the attention."""

from contextlib import suppress
from dataclasses import replace

import streamlit as st

from headwater.dashboard.parts import edit_form, edit_list, edit_results, edit_trials, records, saved
from headwater.dashboard.running import measure as measures, runs
from headwater.dashboard.running.models import is_record, resident
from headwater.dashboard.state import session
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError

state = session.current()
if is_record(state.model):
    st.header("Edit")
    records.draw_needs(state.model, "an edit")
    st.stop()
main = resident(state.model)
model = runs.model_of(state)  # seen from the part that is shown, of which new edits are
whole = replace(state, part="")
plain_run = runs.a(state)
measure = measures.of(state, plain_run)

st.header("Edit")
if len(main.parts) > 1:
    st.caption(
        plain(
            f"New edits act on {model.part_name}, the part chosen at the left; all of the list act together."
        )
    )
form, active = st.columns(2, gap="large")
with form:
    added = edit_form.draw(state, plain_run, model, measure)
    if added is not None:
        edit_form.add(state, added)
edited = None
with active:
    edit_list.draw(state, main)
    if state.has_b():
        with suppress(HeadwaterError):  # told above the page
            edited = runs.b(state)
    if edited is not None:
        edit_results.draw_numbers(measure, plain_run, edited)
        edit_results.draw_answers(state, plain_run, edited)
if edited is not None:
    if state.b_text is not None or state.b_model is not None:
        st.caption("Run B also has another text or model; the controls and the sweep below are of run A's.")
    answers = runs.b(whole)  # losses are of the tokens of the part that answers
    if answers is not None:
        edit_results.draw_losses(state, runs.a(whole), answers)
    edit_results.draw_heads(state, plain_run, edited)
    edit_results.draw_text(state, main, plain_run, edited)
    if state.applied():
        key = (*plain_run.identity, *measure.key)
        controls, sweep = st.columns(2, gap="large")
        with controls:
            edit_trials.draw_controls(state, model, plain_run, measure, key)
        with sweep:
            edit_trials.draw_sweep(state, main, plain_run, measure, key)
left, right = st.columns(2, gap="large")
with left:
    saved.draw_save(state)
with right:
    saved.draw_open(state)
