"""Random controls and the sweep of a strength, as jobs of the page Edit."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import numpy as np
import pandas as pd
import streamlit as st

import headwater as hw
from headwater.dashboard.charts.changes import control_band, sweep_curve
from headwater.dashboard.parts.edits import in_words, told
from headwater.dashboard.parts.job import wait
from headwater.dashboard.running import bench, catalogue
from headwater.dashboard.running.edit_kinds import strength, with_strength
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, clicked, numbers, plain
from headwater.lens.errors import HeadwaterError
from headwater.lens.models.embedded import embedded
from headwater.lens.prompts import prompt_set, prompt_sets

STEPS = 11
ALONE = "this input alone"


def draw_controls(state: State, model: hw.HookedModel, one: Run, measure: Measure, key: tuple) -> None:
    """The edits of the part that is shown at random other heads or tokens; `model` is seen from that part."""
    edits = state.applied()
    here, rest = (
        [edit for edit in edits if (edit.get("part", "") == state.part) is wanted] for wanted in (True, False)
    )
    ways = [at for at, named in (("heads", bench.heads_in(here)), ("tokens", bench.tokens_in(here))) if named]
    st.subheader("Controls")
    if not ways:
        of = " of this part" if rest else ""
        st.caption(f"The edits{of} name no heads and no tokens, so there are no others to try them at.")
        return
    st.caption("Would the same edit do as much elsewhere?")
    at = bound.segments(state, "edit.controls", "At random other", ways)
    seed = bound.number(state, "edit.seed", "Seed", 0, 1000, 0, 1)
    _tell_cost(one, bench.DRAWS + 2, bench.DRAWS + 2)
    if not bound.toggle(state, "edit.control", f"Run {bench.DRAWS} controls"):
        return
    names = [str(hw.Head(layer, head)) for layer in model.layers for head in range(model.n_heads)]
    try:
        tries = [[*rest, *each] for each in bench.elsewhere(here, at, names, len(one.keys), seed=seed)]
    except HeadwaterError as error:
        st.caption(plain(str(error)))
        return
    main = resident(one.name)
    work = partial(_controls, main, main.to_tokens(one.example), measure, edits, tries)
    found = wait(("controls", key, repr(edits), at, seed), work, "random controls", model=one.name)
    if found is None:
        return
    edited, values, plain_value = found
    known = values[np.isfinite(values)]
    change, others = edited - plain_value, known - plain_value
    beyond = int((np.abs(others) >= abs(change)).sum())
    said = (
        f"B changes the measure by {change:+.4g}; {beyond} of {known.size} controls change it as much or more "
        f"(median {np.median(others):+.4g})." if known.size else "No control fits the model."
    )  # fmt: skip
    st.markdown(plain(said))
    figure = control_band(
        values, plain_value, edited, measure.label, f"The same edits at {known.size} random {at}"
    )
    chart(figure, "edit-controls", said)
    named = ["; ".join(in_words(edit, one.keys) for edit in each[len(rest) :]) for each in tries]
    frame = pd.DataFrame({"edits": named, "measure": values, "change": values - plain_value})
    numbers("random-controls", frame, "edit-controls", figure)


def _tell_cost(run: Run, passes: int, rows: int) -> None:
    """How many forward passes will be made, and how long as many prompts one by one would take."""
    told = f"Cost: {passes} forward passes"
    with suppress(HeadwaterError):
        told += f", about {rows * catalogue.seconds_of_a_pass(run.name, run.identity, run):.2g} s"
    st.caption(plain(f"{told}."))


def _controls(model, tokens, measure, edits, tries) -> tuple[float, np.ndarray, float]:
    return (
        bench.measured(model, tokens, measure, edits),
        bench.controls(model, tokens, measure, tries),
        bench.measured(model, tokens, measure, []),
    )


def draw_sweep(state: State, model: hw.HookedModel, one: Run, measure: Measure, key: tuple) -> None:
    """The measure over the strength of one edit; a click sets it."""
    places = [n for n, edit in enumerate(state.edits) if not edit.get("off") and strength(edit) is not None]
    st.subheader("Sweep")
    if not places:
        st.caption("None of the edits that are on has a strength.")
        return
    words = {n: f"{n + 1}: {told(state, state.edits[n])}" for n in places}
    place = bound.choice(state, "edit.swept", "Edit", places, places[0], show=words.__getitem__)
    sets = _sets(model) if measure.answer is not None and not one.labels else {}
    own = next((each for each, prompts in sets.items() if state.text in prompts), ALONE)
    over = bound.choice(
        state, "edit.over", "Over", [ALONE, *sets], own,
        help="intervals need several prompts: those of a set, each with its own answer and distractor",
    )  # fmt: skip
    prompts = [] if over == ALONE else sets[over]
    batches = len(bench.lengths(model, prompts)) or 1
    _tell_cost(one, (STEPS + 1) * batches, (STEPS + 1) * (len(prompts) or 1))
    if not bound.toggle(state, "edit.sweep", "Run the sweep"):
        return
    now = strength(state.edits[place])
    assert now is not None
    applied = state.applied()
    at = sum(not edit.get("off") for edit in state.edits[:place])
    strengths = np.linspace(now.low, now.high, STEPS)
    without = [with_strength(edit, 0.0) if n == at else edit for n, edit in enumerate(applied)]
    work = partial(_sweep, model, one, measure, over, applied, at, strengths)
    found = wait(("sweep", key, repr(without), at, over), work, "sweep", model=one.name)
    if found is None:
        return
    count = found.values.shape[1]
    said = "this input alone, so without an interval" if count == 1 else f"mean of {count} prompts of {over}"
    if count > 1 and bench.tokens_in(applied):
        said += "; tokens are taken by their positions in each prompt"
    title = "The measure over the strength"
    label = measure.label if count == 1 else measure.kind.replace("_", "-") + " of each prompt's answer"
    figure = sweep_curve(
        found.strengths, found.mean, found.interval, float(found.plain.mean()), now.value, now.field, label, title, said
    )  # fmt: skip
    ends = f"{found.mean[0]:.4g} at {found.strengths[0]:g}, {found.mean[-1]:.4g} at {found.strengths[-1]:g}"
    point = clicked(figure, "edit-sweep", f"{title}: {ends}; without the edits {found.plain.mean():.4g}")
    st.caption("A click on a point sets the strength.")
    low, high = found.interval
    frame = pd.DataFrame({"strength": found.strengths, "mean": found.mean, "low": low, "high": high})
    numbers("sweep", frame, "edit-sweep", figure)
    if point is not None:
        state.edits[place] = with_strength(state.edits[place], float(point["x"]))
        session.again()


def _sweep(model, one, measure, over, applied, at, strengths) -> bench.Sweep:
    own = model.name in embedded()
    cases = (
        [(model.to_tokens(one.example), [measure])]
        if over == ALONE
        else bench.cases_of(model, over, own, measure, bench.OF_A_SET)
    )
    return bench.sweep(model, cases, applied, at, strengths)


def _sets(model: hw.HookedModel) -> dict[str, list[str]]:
    """The prompt sets of a model's words, with their first prompts."""
    return _drawn(model.name, model.name in embedded(), model) if model.causal and model.has_lm_head else {}


@st.cache_data(show_spinner=False)
def _drawn(name: str, own: bool, _model: hw.HookedModel) -> dict[str, list[str]]:
    found = {}
    for each in prompt_sets() if own else prompt_sets(_model.tokenizer):
        try:
            examples = (
                prompt_set(each, bench.OF_A_SET) if own else prompt_set(each, bench.OF_A_SET, model=_model)
            )
            if all(example.wrong for example in examples):
                found[each] = [example.prompt for example in examples]
        except HeadwaterError:
            continue  # its tokenizer splits the words of this set
    return found
