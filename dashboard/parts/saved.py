"""Saving a view, the table of what was saved, and opening a file."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from headwater.dashboard import pages
from headwater.dashboard.export import experiment, python, saved
from headwater.dashboard.export.report import report
from headwater.dashboard.parts.edits import told
from headwater.dashboard.parts.job import wait
from headwater.dashboard.running import measure, models, runs
from headwater.dashboard.running.pinned import pinned
from headwater.dashboard.running.runs import edits_of
from headwater.dashboard.state import session, workspace
from headwater.dashboard.state.address import from_address, to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import downloads, plain
from headwater.lens.errors import HeadwaterError

NUMBER = st.column_config.NumberColumn(format="%.4g")


def draw_save(state: State) -> None:
    """Keep this view with its numbers, and the Python of it."""
    st.subheader("This view")
    run = runs.a(state)
    try:
        runs.b(state)
    except HeadwaterError:  # why is told above the page
        st.warning("Run B can not be made, so this view can not be saved.")
        return
    chosen = measure.of(state, run)
    changes = [told(state, edit) for edit in state.applied()]
    words = saved.words_of(state, changes)
    st.text(words)
    if st.button("Save it", type="primary", key="save-run"):
        st.session_state["saving"] = address = to_address(state)
    address = st.session_state.get("saving")
    if address is not None and address == to_address(state):
        key = ("save", tuple(sorted(address.items())))
        found = wait(
            key, lambda: _told(lambda: saved.save(state, address, words, chosen)), "saving", model=state.model
        )
        if found is not None:
            st.session_state.pop("saving")
            if workspace.NAME.fullmatch(found):
                st.success("Saved.")
                held = saved.opened(found)
                if held is not None:
                    _draw_bundle(held, state, f"bundle-new-{found}")
            else:
                st.error(plain(found))
    _draw_report(state, chosen, changes)
    with st.expander("Python that repeats it"):
        st.code(python.as_python(state, chosen), language="python")


def _draw_report(state: State, chosen: measure.Measure, changes: list[str]) -> None:
    """The report as one file, and a way to compute first what of the catalogue is pinned and not there yet."""
    run = runs.shown(state)
    missing = [each for each in pinned(state, run, chosen) if not each.why and each.result is None]
    if missing and st.toggle(f"Compute {len(missing)} pinned results for the report", key="report-results"):
        for each in missing:
            wait(each.key, each.work, each.told, model=run.name)
    st.download_button(
        "Report", lambda: report(state, chosen, changes), "report.html", "text/html", key="report", on_click="ignore",
        help="one page without a network: the measure, the edits, the likeliest answers, the maps of pinned heads, "
        "the pinned results of the catalogue",
    )  # fmt: skip


def draw_open(state: State) -> None:
    st.subheader("Open an experiment")
    st.file_uploader("An experiment file", "json", key="experiment-file", on_change=_open, max_upload_size=16)
    st.caption("It opens here where its model is offered; headwater experiment FILE runs any.")


def _open() -> None:
    file, state = st.session_state["experiment-file"], session.current()
    if file is None:
        return
    session.touch()
    try:
        experiment.take(file.getvalue().decode("utf-8-sig", "replace"), state)
    except HeadwaterError as error:
        state.notices.append(str(error))


def draw_table(state: State) -> None:
    """All saved runs; the chosen one can be opened, run again, taken away and deleted; two are compared."""
    st.subheader("Saved")
    found = saved.everything()
    if not found:
        st.info("None yet.")
        return
    names = list(found)
    table = pd.DataFrame(
        [
            {"saved": each.when, "view": each.words, "measure": each.measure, "A": each.values[0], "B": each.values[1],
             "state": each.state}
            for each in found.values()
        ]
    )  # fmt: skip
    event = st.dataframe(
        table, hide_index=True, key="saved-table", on_select="rerun", selection_mode="multi-row",
        column_config={"A": NUMBER, "B": NUMBER}, alt="Saved runs",
    )  # fmt: skip
    downloads("saved-runs", table, "saved-runs")
    rows = event["selection"]["rows"] if event else []
    rows = [row for row in rows if row < len(names)]
    if not rows:
        st.caption("Choose a row to open it, to run it again or to take it away; two rows to compare them.")
    if len(rows) == 2:
        one, two = (table.iloc[row] for row in rows)
        st.dataframe(
            pd.DataFrame({"first": one, "second": two}).astype(str), key="saved-two", alt="Two saved runs"
        )
    for row in rows[:1]:
        _draw_one(names[row], found[names[row]])


def _draw_one(name: str, each: saved.Saved) -> None:
    held = from_address(each.address, models.offered(), edits_of)
    if held.notices:
        st.warning(plain(held.notices[0]))
    with st.container(horizontal=True):
        st.page_link(pages.page("edit" if held.edits else "heads"), label="Open", query_params=each.address)
        again = st.button("Run again and compare", key=f"verify-{name}", disabled=bool(held.notices))
        _draw_bundle(each, held, f"bundle-{name}")
        if st.button("Delete", key=f"delete-{name}"):
            workspace.remove("runs", name)
            st.rerun()
    if again:
        st.session_state["verifying"] = name
    if st.session_state.get("verifying") == name:
        told = wait(
            ("verify", name),
            lambda: _told(lambda: saved.verify(each, held)),
            "running it again",
            model=held.model,
        )
        if told is not None:
            st.text(told[0].upper() + told[1:] + ".")
    given = models.source(held.model)
    more = f" --model {given}" if given != held.model else ""
    st.caption(
        plain(f"headwater experiment experiment.json{more} runs it again and compares it with these results.")
    )


def _draw_bundle(each: saved.Saved, state: State, key: str) -> None:
    """The experiment, the results that it had here, and its picture, as one file."""
    st.download_button(
        "Experiment and results", lambda: experiment.archive(saved.files(each, state)), "experiment.zip",
        "application/zip", key=key, on_click="ignore",
    )  # fmt: skip


def _told(work) -> str:
    try:
        return work()
    except HeadwaterError as error:
        return str(error)
