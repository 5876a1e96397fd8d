"""`wait`: long work as a page shows it: the result, or its progress with a Cancel button while the page goes on."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import streamlit as st
from streamlit.runtime import exists, get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

from headwater.dashboard.running import jobs, runs
from headwater.dashboard.running.jobs import Job, Lane
from headwater.dashboard.state.kept import Kept
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError

PATIENCE = 0.4  # seconds that a page waits before it shows progress
RUN = 1.0  # the same for a short run of a model, which the whole page needs
EVERY, SELDOM = 0.5, 1.0  # seconds between two looks at a job, and at one that may take long
WAITING = 3.0  # and at one that waits its turn
STATES = "headwater.dashboard.state"  # where the classes live whose objects a session changes
ASKED, CANCELLED = "jobs-asked", "jobs-cancelled"  # of this session: {what: key}, {key}
PAGE = "jobs-page"


@dataclass(frozen=True)
class Unfit:
    """Why work has no result here."""

    why: str


def wait(
    key: Hashable, work: Callable[[], Any], what: str, *, model: str, patience: float | None = None,
    lane: Lane = "long", kept: Kept | None = None, failed: Callable[[str], None] | None = None,
) -> Any:  # fmt: skip
    """The result of `work`, which is kept by `key`; None while it is under way, after it failed, or once cancelled.

    What is shown instead says so where the result would stand. `what` names the result, such as "importance of each
    head", and its place on the page: when the session asks for another key under the same name, it waits for the
    former no more. `work` runs in a thread: it draws nothing, and never gives None. It may begin when the session has
    moved on, so it keeps a copy of the state that it refers to. It waits for work on the same model in the same `lane`.
    The error of work that failed is shown, or given to `failed`.
    """
    who = _session()
    asked: dict[str, Hashable] = st.session_state.setdefault(ASKED, {})
    cancelled: set[Hashable] = st.session_state.setdefault(CANCELLED, set())
    if asked.get(what, key) != key:
        jobs.leave(asked[what], who)
    asked[what] = key
    if key in cancelled and key not in (jobs.results if kept is None else kept):
        _draw_cancelled(key, what, cancelled)
        return None
    job = jobs.ask(key, apart(work), what, model, who, lambda: _is_here(who), lane, kept)
    seconds = PATIENCE if patience is None else max(patience, PATIENCE)
    if jobs.before(job) is None or seconds > PATIENCE:  # one that waits its turn is not done in a moment
        job.ended.wait(seconds)
    if not job.ended.is_set():
        every = EVERY if lane in ("light", "short run") else SELDOM
        every = every if jobs.before(job) is None else WAITING
        st.fragment(_draw_progress, run_every=every)(job, what, who, cancelled)
    elif job.error is not None and failed is not None:
        failed(job.error)
    elif job.error is not None:
        draw_error(job.error, key, what)
    elif job.result is None:
        _draw_cancelled(key, what, cancelled)
    return job.result


def fitting(key: Hashable, work: Callable[[], Any], what: str, *, model: str, lane: Lane = "long") -> Any:
    """`wait`, for work that may not fit the model or its input: that is said in one line, and gives None.

    The line is kept like a result, so that work which can not be done is tried once.
    """

    def tried() -> Any:
        try:
            return work()
        except HeadwaterError as error:
            return Unfit(str(error))

    found = wait(key, tried, what, model=model, lane=lane)
    if isinstance(found, Unfit):
        st.caption(plain(f"{_capital(what)}: {found.why}"))
        return None
    return found


def run(asked: runs.Asked, failed: Callable[[str], None] | None = None) -> runs.Run | None:
    """`wait`, for a run of a model on an input."""
    patience = RUN if asked.lane == "short run" else None
    return wait(
        asked.key, asked.work, asked.what, model=asked.model, patience=patience, lane=asked.lane, kept=runs.kept,
        failed=failed,
    )  # fmt: skip


def begin(page: str) -> None:
    """Wait no more for what another page of this session asked for: its work would only be in the way.

    Runs are for every page.
    """
    if st.session_state.get(PAGE) != page:
        asked: dict[str, Hashable] = st.session_state.get(ASKED, {})
        for what in [each for each in asked if not each.startswith(runs.NAMES)]:
            jobs.leave(asked.pop(what), _session())
    st.session_state[PAGE] = page


def sentence(job: Job) -> str:
    """How far a job is: "12 of 32 heads, about 9 s more"."""
    if not job.running:
        other = jobs.before(job)
        return f"{_capital(job.what)} waits for {other.what if other else 'other work'} to end."
    if not job.total:
        return f"{_capital(job.what)}: {job.seconds:.0f} s so far"
    counted = f"{_capital(job.what)}: {job.done} of {job.total} {plural(job.unit)}"
    rest = job.rest
    return f"{counted}, {job.seconds:.0f} s so far" if rest is None else f"{counted}, about {rest:.0f} s more"


def plural(unit: str) -> str:
    """As progress counts it: heads, batches, queries."""
    if unit.endswith("y"):
        return f"{unit[:-1]}ies"
    return f"{unit}es" if unit.endswith(("ch", "sh", "x", "s")) else f"{unit}s"


def apart(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same function, with copies of the states that it refers to."""
    if not isinstance(work, FunctionType) or work.__closure__ is None:
        return work
    cells = tuple(CellType(_copied(cell.cell_contents)) for cell in work.__closure__)
    same = FunctionType(work.__code__, work.__globals__, work.__name__, work.__defaults__, cells)
    same.__kwdefaults__ = work.__kwdefaults__
    return same


def _copied(value: Any) -> Any:
    if isinstance(value, FunctionType):
        return apart(value)
    return copy.deepcopy(value) if type(value).__module__.startswith(STATES) else value


def draw_error(why: str, key: Hashable, what: str = "") -> None:
    st.error(plain(why), icon=":material/error:")
    st.button("Try again", key=f"again-{_short((key, what))}", on_click=jobs.again, args=(key,))


def _draw_progress(job: Job, what: str, who: str, cancelled: set[Hashable]) -> None:
    """One job may stand in two places of a page, as where A and B ask for the same."""
    if job.ended.is_set() or job.key in cancelled:
        st.rerun()

    def cancel() -> None:
        cancelled.add(job.key)
        jobs.leave(job.key, who)

    share = min(job.done / job.total, 1.0) if job.running and job.total else 0.0
    with st.container(horizontal=True, vertical_alignment="center", key=f"job-{_short((job.key, what))}"):
        st.progress(share, text=plain(sentence(job)))
        st.button("Cancel", key=f"cancel-{_short((job.key, what))}", on_click=cancel)


def _draw_cancelled(key: Hashable, what: str, cancelled: set[Hashable]) -> None:
    st.caption(plain(f"{_capital(what)}: cancelled."))
    st.button("Compute", key=f"compute-{_short((key, what))}", on_click=cancelled.discard, args=(key,))


def _session() -> str:
    context = get_script_run_ctx()
    return "" if context is None else context.session_id


def _is_here(who: str) -> bool:
    return not exists() or get_instance().is_active_session(who)


def _capital(what: str) -> str:
    return what[:1].upper() + what[1:]


def _short(key: Hashable) -> str:
    """A name of a key for an element of a page."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:10]
