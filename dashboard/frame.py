"""What stands above every page: the measure, runs A and B, which of them is shown, and what is to be told."""

from __future__ import annotations

import numpy as np
import streamlit as st

from headwater.dashboard import pages
from headwater.dashboard.parts import job, records
from headwater.dashboard.parts.edits import told
from headwater.dashboard.running import measure, models, runs
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError

# the header of Streamlit lies over the page: what comes first must stand below it
STYLE = """
.stMainBlockContainer{padding-top:4.4rem;padding-bottom:2rem}
.st-key-frame{padding-bottom:.2rem}
@media (max-width:640px){.stMainBlockContainer{padding-left:.8rem;padding-right:.8rem}
[class*="st-key-wide-"]{overflow-x:auto}
[class*="st-key-wide-"]>*{min-width:44rem}}
"""
WITHOUT_RUN, WITHOUT_BAR = ("experiments",), ("start",)
WAITS = "frame-waits"  # the runs whose progress stands above the page
TOLD = "frame-told"  # the errors that a notice above the page tells
SHOWN = {"a": "A: as it is", "b": "B", "difference": "B − A"}


def draw(state: State, page: str) -> bool:
    """The bar, and the notices of this run of the page; whether run A is there, without which there is no page."""
    if not state.has_b():
        state.shown = "a"  # an address may ask for a run B whose edits were refused
    for notice in session.told(page):
        st.warning(plain(notice))
    tell(state, page)
    st.session_state[WAITS], st.session_state[TOLD] = set(), set()
    if page in pages.OF_RESULTS:
        return True
    if page in WITHOUT_RUN:
        _run_b(state)  # what is saved is the whole view
        return True
    plain_run = _run_a(state)
    if plain_run is None:
        return False
    if page in WITHOUT_BAR:
        return True
    bar = st.container(key="frame", border=True, horizontal=True, vertical_alignment="center", gap="small")
    with st.container(key="frame-work"):
        other = _run_b(state)
    with bar:
        _measure(state, plain_run, other)
        _second(state, plain_run)
        if page in pages.OF_SHOWN and state.b_model is not None and state.shown == "b" and other is not None:
            state.fit(other.layers, other.n_heads, models.called(other.name))
        if state.has_b() and page not in pages.OF_BOTH:
            bound.segments(
                state,
                "shown",
                "Shown",
                list(SHOWN),
                "a",
                show=SHOWN.__getitem__,
                label_visibility="collapsed",
            )
    return True


def draw_pending(asked: runs.Asked) -> None:
    """The place of a page, or of its rest, that needs a run which is not there yet."""
    if asked.what in st.session_state[WAITS]:
        st.caption(f"The page goes on when {asked.what} is there.")
    elif job.run(asked) is not None:
        session.again()


def _run_a(state: State) -> runs.Run | None:
    try:
        return runs.a(state)
    except runs.Failed as failed:
        job.draw_error(str(failed), failed.key)
        return None
    except runs.Pending as pending:
        st.session_state[WAITS].add(pending.asked.what)
        return job.run(pending.asked)


def _run_b(state: State) -> runs.Run | None:
    """Run B; None where it is not there yet. Where it can not be made that is told, so that the page can be mended."""

    def failed(why: object) -> None:
        state.notices.append(f"Run B can not be made: {why}. Run A is shown.")
        st.session_state[TOLD].add(str(why))
        state.shown = "a"

    try:
        return runs.b(state)
    except HeadwaterError as error:
        failed(error)
    except runs.Pending as pending:
        st.session_state[WAITS].add(pending.asked.what)
        return job.run(pending.asked, failed)
    return None


def tell(state: State, page: str) -> None:
    """What is new to tell. It stays above the page, also when a job that ends draws it anew, until the person acts."""
    told = session.told(page)
    for notice in dict.fromkeys(state.notices):
        if notice not in told:
            st.warning(plain(notice))
            told.append(notice)
    state.notices.clear()


def _measure(state: State, plain_run: runs.Run, other: runs.Run | None) -> None:
    """What is measured, its value in the runs, and a place to change it."""
    chosen = measure.of(state, plain_run)
    for name, given, shown in (
        ("measure", state.kind, chosen.kind),
        ("answer", state.answer, chosen.answer),
        ("distractor", state.wrong, chosen.wrong),
    ):
        if given not in (None, "", shown) and shown is not None:
            state.notices.append(f"{given!r} is no {name} here; showing the page's own.")
            state.put(
                {"measure": "kind", "distractor": "wrong"}.get(name, name), "" if name == "measure" else None
            )
    if chosen.kind == "none":
        st.markdown("No measure: a record holds no answer.")
        return
    with st.popover(plain(f"Measure: {chosen.label}"), icon=":material/straighten:"):
        offered = measure.kinds(plain_run)
        bound.choice(
            state, "kind", "Every page measures", offered, offered[0], show=measure.KINDS.__getitem__
        )
        if chosen.answer is not None:
            ranked = measure.likeliest(plain_run, 30)
            wrong = [] if chosen.wrong is None else [chosen.wrong]
            options = list(dict.fromkeys([*ranked, chosen.answer, *wrong]))
            odds = np.exp(plain_run.log_probabilities())
            name = lambda n: f"{measure.quoted(plain_run.label(n))} {odds[n]:.3g} #{n}"  # noqa: E731
            _pick(state, "answer", "Answer, and its probability", options, chosen.answer, name)
            if chosen.kind == "difference":
                _pick(
                    state,
                    "wrong",
                    "Distractor",
                    [n for n in options if n != chosen.answer],
                    chosen.wrong,
                    name,
                )
            bound.text(state, "measure.other", "Another token as the answer", placeholder="Mary", then=_other)
    one = chosen.value(plain_run)
    two = None if other is None else chosen.value(other)
    words = "no value" if one is None else f"A {one:.4g}"
    if two is not None and one is not None:
        words += f" → B {two:.4g} ({two - one:+.4g} {chosen.unit})"
    elif one is not None:
        words += f" {chosen.unit}"
    st.markdown(plain(words), help="the measure in run A and, where there is one, in run B")


def _pick(
    state: State, name: str, label: str, options: list[int], value: int | None, show: bound.Show
) -> None:
    if state.get(name) is None:
        bound.choice(
            state, f"measure.{name}", label, options, value, show=show, then=lambda new: _chosen(new, name)
        )
    else:
        bound.choice(state, name, label, options, value, show=show)


def _chosen(state: State, name: str) -> None:
    state.put(name, state.settings.pop(f"measure.{name}"))


def _other(state: State) -> None:
    """Take a typed word as the answer."""
    from headwater.lens.models.token_ids import class_id, token_id

    typed = str(state.settings.pop("measure.other", ""))
    if not typed:
        return
    model = models.resident(state.model)
    try:
        state.answer = (token_id if model.has_lm_head else class_id)(model, typed, "answer")
        state.wrong = None
    except HeadwaterError as error:
        state.notices.append(str(error))


def _second(state: State, plain_run: runs.Run) -> None:
    """Run B in words, and a place to make one of another text or model."""
    parts = [told(state, edit) for edit in state.applied()]
    parts += ["another text"] if state.b_text is not None else []
    parts += [f"model {models.called(state.b_model)}"] if state.b_model is not None else []
    words = "none" if not parts else parts[0] if len(parts) == 1 else f"{len(parts)} changes"
    with st.popover(plain(f"Run B: {words}"), icon=":material/call_split:"):
        for each in parts:
            st.text(f"• {each}")
        if plain_run.example and state.text:
            bound.text(
                state,
                "compare.text",
                "Another text for run B",
                state.b_text or "",
                area=True,
                then=_take_text,
            )
        names = [name for name in records.offered(state) if models.is_record(name) or not plain_run.of_record]
        bound.choice(
            state, "compare.model", "Another record for run B" if plain_run.of_record else "Another model for run B",
            ["the same", *names], state.b_model or "the same", show=records.shown, then=_take_model,
        )  # fmt: skip
        if parts and st.button("Run A alone", key="no-b"):
            state.edits, state.b_text, state.b_model, state.shown = [], None, None, "a"
            session.again()
        st.caption("Edits are made on the page Edit.")


def _take_text(state: State) -> None:
    typed = str(state.settings.pop("compare.text", ""))
    state.b_text = typed if typed and typed != state.text else None
    state.shown = "b" if state.b_text is not None else "a"


def _take_model(state: State) -> None:
    chosen = state.settings.pop("compare.model", "the same")
    state.b_model = None if chosen in ("the same", state.model) else str(chosen)
    state.shown = "b" if state.b_model is not None else "a"
