"""A page gets a result at once where it is kept, waits for it otherwise, and says what happens meanwhile.

Seen to fail with a cancel that leaves the job alone, a cancelled job that begins again by itself, and an error that
stays after "Try again".
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from headwater.dashboard.parts import job as part
from headwater.dashboard.running import jobs
from headwater.dashboard.running.jobs import Job
from headwater.dashboard.state.kept import Kept
from headwater.lens.errors import HeadwaterError
from headwater.lens.progress import progress

LONG = 20.0


class Work:
    """What the page asks for: it counts to 4, stands at 1 until it may go on, and fails while there is an error."""

    key = "key"

    def __init__(self) -> None:
        self.go, self.calls, self.error = threading.Event(), 0, ""

    def __call__(self) -> str:
        self.calls += 1
        if self.error:
            raise HeadwaterError(self.error)
        with progress(total=4, desc="count", unit="head") as bar:
            bar.update()
            while not self.go.wait(0.002):
                bar.update(0)
        return f"result of {self.key}"


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    monkeypatch.setattr(jobs, "results", Kept(10_000))
    monkeypatch.setattr(jobs, "LOOK", 0.0)
    monkeypatch.setattr(part, "PATIENCE", 0.1)
    work = Work()
    monkeypatch.setattr(part, "work_of_the_test", work, raising=False)
    yield work
    work.go.set()
    for job in [*jobs._jobs.values(), *jobs._running.values()]:
        assert job.ended.wait(LONG)
    jobs._faults.clear()


def page() -> None:
    import streamlit as st

    from headwater.dashboard.parts import job

    work = job.work_of_the_test  # type: ignore[attr-defined]
    found = job.wait(work.key, work, "importance of each head", model="model")
    st.text(f"page: {found}")


def shown(app: AppTest) -> str:
    return app.text[0].value


def bars(app: AppTest) -> list[Any]:
    return [each.proto.text.replace("\\", "") for each in app.get("progress")]


def press(app: AppTest, label: str) -> None:
    next(button for button in app.button if button.label == label).click().run()


def opened() -> AppTest:
    app = AppTest.from_function(page, default_timeout=60).run()
    assert not app.exception
    return app


def test_a_page_waits_and_then_has_it_at_once(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "PATIENCE", LONG)
    work.go.set()
    assert shown(opened()) == "page: result of key"
    assert shown(opened()) == "page: result of key"
    assert work.calls == 1


def test_a_page_goes_on_while_the_job_counts(work: Work) -> None:
    app = opened()
    assert shown(app) == "page: None"
    assert "1 of 4 heads, about" in bars(app)[0]
    work.go.set()
    next(iter(jobs._running.values())).ended.wait(LONG)
    app.run()
    assert shown(app) == "page: result of key"
    assert not bars(app)


def test_cancel_ends_the_job_and_nothing_begins_by_itself(work: Work) -> None:
    app = opened()
    job = jobs._running["model", "long"]
    press(app, "Cancel")
    assert job.ended.wait(LONG)
    app.run()
    assert app.caption[0].value.endswith("cancelled\\.")
    assert work.calls == 1
    press(app, "Compute")
    work.go.set()
    jobs._running["model", "long"].ended.wait(LONG)
    assert shown(app.run()) == "page: result of key"


def test_a_cancel_does_not_end_it_for_another_session(work: Work) -> None:
    app = opened()
    job = jobs.ask("key", work, "importance of each head", "model", "another")
    press(app, "Cancel")
    assert not job.ended.wait(0.1)
    work.go.set()
    assert job.ended.wait(LONG)
    assert shown(app.run()) == "page: result of key"  # which is there now


def test_another_key_in_its_place_ends_the_wait_for_the_former(work: Work) -> None:
    app = opened()
    former = jobs._running["model", "long"]
    work.key = "other key"
    app.run()
    assert former.ended.wait(LONG)
    assert former.result is None
    work.go.set()
    while work.key not in jobs.results:
        jobs._jobs[work.key].ended.wait(LONG)
    assert shown(app.run()) == "page: result of other key"


def test_an_error_stands_where_the_result_would(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "PATIENCE", LONG)
    work.error = "no head *9*"
    app = opened()
    assert app.error[0].value == r"no head \*9\*"
    assert shown(app.run()) == "page: None"
    assert work.calls == 1
    work.error = ""
    work.go.set()
    press(app, "Try again")
    assert shown(app) == "page: result of key"
    assert not app.error


def test_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    job = Job("key", lambda: None, "loss of each head", "model")
    assert part.sentence(job) == "Loss of each head waits for other work to end."
    job.running, job.begun = True, 10.0
    now[0] = 12.0
    assert part.sentence(job) == "Loss of each head: 2 s so far"
    job.tell("batches", 0, 8, "batch")
    now[0] = 15.0
    job.tell("batches", 2, 8, "batch")
    assert part.sentence(job) == "Loss of each head: 2 of 8 batches, about 9 s more"
    assert [part.plural(unit) for unit in ("query", "layer input")] == ["queries", "layer inputs"]


@dataclass
class Looked:
    """As a session looks at it, and changes it."""

    model: str
    edits: list[int]


Looked.__module__ = f"{part.STATES}.state"


def test_work_keeps_the_state_of_the_moment_when_it_was_asked_for() -> None:
    looked, other = Looked("first", [1]), Job

    def inner(more: str = "more") -> tuple[object, ...]:
        return looked.model, list(looked.edits), more, other

    kept = [part.apart(inner), part.apart(lambda: inner())]
    looked.model = "second"
    looked.edits.append(2)
    assert [work() for work in kept] == [("first", [1], "more", Job)] * 2
    assert inner()[:2] == ("second", [1, 2])


def two_places() -> None:
    from headwater.dashboard.parts import job

    for what in ("heads of A", "heads of B"):
        job.wait("key", job.work_of_the_test, what, model="small")


def test_one_job_stands_in_two_places_of_a_page(work: Work) -> None:
    """Seen to fail with a key of the job alone."""
    app = AppTest.from_function(two_places, default_timeout=LONG).run()
    assert not app.exception
    assert [each.label for each in app.button] == ["Cancel", "Cancel"]
    assert work.calls == 1
