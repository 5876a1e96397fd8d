"""What the page Catalogue shows: the list of analyses by question, a form, and a result with its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import streamlit as st

from headwater.analyses._catalogue.catalogue import Entry, entry
from headwater.analyses._catalogue.settings import Setting
from headwater.dashboard import pages
from headwater.dashboard.parts import records
from headwater.dashboard.parts.circuits import choose_corrupt
from headwater.dashboard.parts.job import wait
from headwater.dashboard.running import catalogue, jobs
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.pairs import Corrupt
from headwater.dashboard.running.pinned import PINS, in_words
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, numbers, plain
from headwater.lens.errors import HeadwaterError

CHOSEN, SEARCH = "catalogue.analysis", "catalogue.search"
NONE = "none"
ACROSS = 3  # fields of a form side by side


def draw_list(state: State, of_record: bool) -> None:
    """All analyses under their questions, those that a search leaves; `of_record`: those that need a record alone."""
    search = bound.text(
        state, SEARCH, "Search", "", placeholder="a word of a name, a question, a unit or a source"
    )
    found = catalogue.by_question(search, of_record)
    count = sum(map(len, found.values()))
    told = " that need a record alone; the others run the model" if of_record else ""
    st.caption(f"{count} analyses{told}" if count else "No analysis says that; try another word.")
    for question, rows in found.items():
        with st.expander(plain(f"{question} ({len(rows)})"), expanded=bool(search.strip())):
            for each in rows:
                st.button(
                    plain(f"{each.name}: {each.question}"), key=f"choose-{each.name}", type="tertiary",
                    on_click=choose, args=(each.name,),
                )  # fmt: skip


def choose(name: str | None) -> None:
    state = session.current()
    if name is None:
        state.settings.pop(CHOSEN, None)
    else:
        state.put(CHOSEN, name)
    session.touch()


def draw_entry(state: State, run: Run, chosen: Measure, asked: Entry) -> None:
    """One analysis: what it says of itself, its form, and its result."""
    st.button("All analyses", icon=":material/arrow_back:", key="all-analyses", on_click=choose, args=(None,))
    st.subheader(plain(asked.question))
    st.markdown(f"**{plain(asked.name)}** · {plain(asked.unit)}")
    st.caption(plain(f"Source: {asked.paper}. Not for: {asked.not_for}."))
    with st.expander("What it computes"):
        st.code(asked.description, language=None, wrap_lines=True)
    if asked.inputs == "circuits":
        st.info("It compares two circuits; the page Circuits does that under Overlap.")
        st.page_link(pages.page("circuits"), query_params=to_address(state))
        return
    if run.of_record and asked.inputs != "record":
        records.draw_needs(run.name, asked.name)
        return
    corrupt = choose_corrupt(state, chosen) if asked.inputs == "model+pairs" else None
    filled = catalogue.of_measure(asked, chosen, run)
    typed = draw_form(state, asked, filled)
    if filled:
        st.caption(plain(f"{', '.join(filled)} are those of {chosen.label}."))
    if catalogue.takes_loss(asked):
        st.caption(
            plain(
                f"Of the page's measure, {chosen.label}, as a loss: negated, so that a rise is a fall of it."
            )
        )
    try:
        settings = catalogue.read(asked, typed, filled)
    except HeadwaterError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return
    _draw_cost(state, run, asked)
    if asked.inputs == "model+pairs" and corrupt is None:
        return
    _draw_result(state, run, chosen, asked, settings, corrupt)


def draw_form(state: State, asked: Entry, filled: Mapping[str, Any]) -> dict[str, Any]:
    """A field for each setting; gives what stands in them."""
    found = {}
    settings = catalogue.fields(asked)
    for start in range(0, len(settings), ACROSS):
        row = settings[start : start + ACROSS]
        for column, setting in zip(st.columns(ACROSS, vertical_alignment="bottom"), row, strict=False):
            with column:
                found[setting.name] = _field(state, asked, setting, filled.get(setting.name, setting.default))
    return found


def _field(state: State, asked: Entry, setting: Setting, default: Any) -> Any:
    """The field of one setting: a number, a switch or a choice where its values are such, else a line of text."""
    name = setting_name(asked.name, setting.name)
    label = setting.name.replace("_", " ").capitalize() + (" (needed)" if setting.required else "")
    hint, bounds = plain(setting.help) or None, setting.bounds
    if setting.kind == "choice":
        options = [*([NONE] if setting.optional else []), *setting.choices]
        first = NONE if default is None else default if default in options else options[0]
        value = bound.choice(state, name, label, options, first, help=hint)
        return None if value == NONE and setting.optional else value
    if setting.kind == "flag" and isinstance(default, bool):
        return bound.toggle(state, name, label, default, help=hint)
    below = bounds.high is not None and bounds.high < 0  # a number field of Streamlit begins at 0
    whole = setting.kind == "integer" and isinstance(default, int) and not isinstance(default, bool)
    if (
        not setting.optional
        and not below
        and (whole or (setting.kind == "number" and isinstance(default, (int, float))))
    ):
        kind = int if whole else float
        low, high = (None if limit is None else kind(limit) for limit in (bounds.low, bounds.high))
        return bound.number(state, name, label, low, high, kind(default), help=hint)
    return bound.text(state, name, label, catalogue.as_text(default), help=hint)


def setting_name(analysis: str, setting: str) -> str:
    """The name of an analysis' setting in the state."""
    return f"catalogue.{analysis}_{setting}"


def _draw_cost(state: State, run: Run, asked: Entry) -> None:
    told = f"Cost: {asked.cost}. Here: {len(run.keys)} tokens, {len(run.layers)} layers × {run.n_heads} heads"
    try:
        each = catalogue.seconds_of_a_pass(run.name, run.identity, run)
    except HeadwaterError:
        st.caption(plain(told + "."))
        return
    told += f"; a forward pass takes {each:.2g} s"
    count = catalogue.passes(asked, run)
    st.caption(plain(told + (f", so about {count * each:.2g} s or more." if count else ".")))


def _draw_result(
    state: State, run: Run, chosen: Measure, asked: Entry, settings: dict[str, Any], corrupt: Corrupt | None
) -> None:
    key = catalogue.key_of(asked, settings, run, chosen, corrupt)
    with st.container(horizontal=True):
        if st.button("Run", key="run-analysis", type="primary"):
            st.session_state["catalogue-run"] = key
        pin = {"analysis": asked.name, "settings": json.loads(catalogue.settings_text(settings))}
        pinned = pin in state.listed(PINS)
        if st.button("Unpin result" if pinned else "Pin result", key="pin-result",
                     help="keeps it in the list below and in the report, made on the page Experiments"):  # fmt: skip
            others = [each for each in state.listed(PINS) if each != pin]
            state.put(PINS, others if pinned else [*others, pin])
            session.again()
    if st.session_state.get("catalogue-run") != key and key not in jobs.results:
        return
    result = wait(
        key, lambda: catalogue.ask(state, run, chosen, asked, settings, corrupt.example if corrupt else None),
        f"{asked.name}", model=run.name,
    )  # fmt: skip
    if result is not None:
        draw_result(run, asked, result)


def draw_result(run: Run, asked: Entry, result: Any) -> None:
    """The figure of a result and its numbers."""
    frame, figure = catalogue.table(result), None
    try:
        figure = catalogue.figure_of(result, run)
        chart(figure, f"result-{asked.name}", f"{asked.question} {catalogue.seen(frame)}")
    except HeadwaterError as error:
        st.info(plain(f"No figure: {error}"))
    numbers(asked.name, frame, f"result-{asked.name}-numbers", figure)


def draw_pins(state: State) -> None:
    """The pinned results, each a way back to its form."""
    pins = list(catalogue.pins_of(state.listed(PINS)))
    if not pins:
        return
    st.subheader("Pinned results")
    for number, (name, settings) in enumerate(pins):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button(
                plain(in_words(name, settings)), key=f"open-pin-{number}", type="tertiary",
                on_click=_open, args=(name, settings),
            )  # fmt: skip
            st.button("Unpin", key=f"unpin-{number}", on_click=_unpin, args=(name, settings))


def _open(name: str, settings: Mapping[str, Any]) -> None:
    state = session.current()
    asked = entry(name)
    for setting in asked.settings:
        state.settings.pop(setting_name(name, setting.name), None)
        if setting.name in settings:
            value = settings[setting.name]
            kept = isinstance(value, (bool, int, float)) and setting.kind in ("flag", "integer", "number")
            state.put(setting_name(name, setting.name), value if kept else catalogue.as_text(value))
    choose(name)


def _unpin(name: str, settings: Mapping[str, Any]) -> None:
    state = session.current()
    gone = {"analysis": name, "settings": settings}
    state.put(PINS, [each for each in state.listed(PINS) if each != gone])
    session.touch()
