"""Jobs are shared by their key, end when nobody waits, tell their errors, and never hold up a quick run.

Seen to fail with a waiter that is not counted, a `check` that never raises, a fault that is not told, two jobs at once
on one model, and a quick run that takes the lane of the jobs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import pytest
import torch
from tiny_models import tiny

import headwater as hw
from headwater import analyses
from headwater.dashboard.running import jobs
from headwater.dashboard.state.kept import Kept
from headwater.lens.errors import HeadwaterError
from headwater.lens.progress import progress

IDS = torch.arange(3, 15)[None]
LONG = 20.0


@pytest.fixture(autouse=True)
def none_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(jobs, "results", Kept(10_000))
    monkeypatch.setattr(jobs, "LOOK", 0.0)
    yield
    wait_until(lambda: not jobs._running)
    assert not jobs._jobs
    jobs._faults.clear()


def wait_until(so: Callable[[], bool]) -> None:
    until = time.monotonic() + LONG
    while not so():
        assert time.monotonic() < until
        time.sleep(0.005)


class Steps:
    """Work of many steps that goes on until it is told to end."""

    def __init__(self, result: object = "result") -> None:
        self.result, self.begun, self.go, self.calls = result, threading.Event(), threading.Event(), 0

    def __call__(self) -> object:
        self.calls += 1
        with progress(total=4, desc="count", unit="head") as bar:
            bar.update()
            self.begun.set()
            while not self.go.is_set():
                bar.update(0)
                time.sleep(0.002)
        return self.result


def test_two_sessions_share_the_job_of_one_key() -> None:
    work = Steps()
    one = jobs.ask("key", work, "heads", "model", "Ann")
    other = jobs.ask("key", work, "heads", "model", "Bob")
    assert one is other
    work.go.set()
    assert one.ended.wait(LONG)
    assert one.result == jobs.ask("key", work, "heads", "model", "Cem").result == "result"
    assert work.calls == 1


def test_a_job_ends_when_the_last_one_leaves_it() -> None:
    work = Steps()
    job = jobs.ask("key", work, "heads", "model", "Ann")
    jobs.ask("key", work, "heads", "model", "Bob")
    assert work.begun.wait(LONG)
    jobs.leave("key", "Ann")
    assert not job.ended.wait(0.05)
    jobs.leave("key", "Bob")
    assert job.ended.wait(LONG)
    assert (job.result, job.error, "key" in jobs.results) == (None, None, False)
    again = jobs.ask("key", work, "heads", "model", "Ann")
    work.go.set()
    assert again.ended.wait(LONG)
    assert again.result == "result"


def test_a_session_that_went_away_waits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "GONE", 0.02)
    there = [True]
    work = Steps()
    job = jobs.ask("key", work, "heads", "model", "Ann", lambda: there[0])
    assert not job.ended.wait(0.1)
    there[0] = False
    assert job.ended.wait(LONG)
    assert job.result is None


def test_a_cancelled_analysis_leaves_the_model_as_it_was() -> None:
    model = hw.load(tiny("llama"))
    before, revision = model(IDS), model.revision
    layers = threading.Event()

    def work() -> object:
        for _ in range(10_000):
            with model.edit(hw.Temperature(2.0)):
                analyses.head_importance(model, IDS)
            layers.set()
        return "too late"

    job = jobs.ask("key", work, "importance", "model")
    assert layers.wait(LONG)
    jobs.leave("key")
    assert job.ended.wait(LONG)
    assert torch.equal(model(IDS), before)
    assert model.revision == revision
    assert not any(module._forward_hooks for module in model.hf.modules())
    assert all(weight.grad is None for weight in model.hf.parameters())


def test_one_forward_pass_is_cancelled_between_its_layers() -> None:
    model = hw.load(tiny("llama"))
    entered = threading.Event()
    calls: list[int] = []

    def slow(module: object, given: object) -> None:
        calls.append(1)
        entered.set()
        wait_until(lambda: job._unwanted)

    handle = model.hf.model.layers[0].mlp.register_forward_pre_hook(slow)
    job = jobs.ask("key", lambda: model(IDS), "a run", "model")
    assert entered.wait(LONG)
    jobs.leave("key")
    assert job.ended.wait(LONG)
    handle.remove()
    assert job.result is None
    assert len(calls) == 1


def test_a_quick_run_answers_while_a_job_is_at_the_model() -> None:
    model = hw.load(tiny("llama"))
    work = Steps()
    job = jobs.ask("key", work, "heads", "model")
    assert work.begun.wait(LONG)
    with jobs.quick("model"), jobs.quick("model"):
        assert model(IDS).shape[1] == IDS.shape[1]
    assert job.running
    work.go.set()
    assert job.ended.wait(LONG)


def test_jobs_of_one_model_run_in_their_order_and_another_model_does_not_wait() -> None:
    first, second, other = Steps(1), Steps(2), Steps(3)
    one = jobs.ask(1, first, "first", "model")
    two = jobs.ask(2, second, "second", "model")
    three = jobs.ask(3, other, "other", "another")
    assert other.begun.wait(LONG)
    assert jobs.before(two) is one
    assert not second.begun.is_set()
    first.go.set()
    assert second.begun.wait(LONG)
    assert jobs.before(two) is None
    for work in (second, other):
        work.go.set()
    assert all(job.ended.wait(LONG) for job in (one, two, three))


def test_one_that_waits_its_turn_can_leave() -> None:
    first, second = Steps(), Steps()
    jobs.ask(1, first, "first", "model")
    two = jobs.ask(2, second, "second", "model")
    jobs.leave(2)
    assert two.ended.is_set()
    first.go.set()
    wait_until(lambda: not jobs._running)
    assert second.calls == 0


def test_an_error_is_told_until_the_work_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def wrong() -> object:
        calls.append(1)
        raise HeadwaterError("no such head")

    for _ in range(2):
        job = jobs.ask("key", wrong, "heads", "model")
        assert job.ended.wait(LONG)
        assert job.error == "no such head"
    assert len(calls) == 1
    jobs.again("key")
    assert jobs.ask("key", lambda: 5, "heads", "model").ended.wait(LONG)
    assert jobs.ask("key", lambda: 5, "heads", "model").result == 5
    broken = jobs.ask("other", lambda: 1 / 0, "heads", "model")
    assert broken.ended.wait(LONG)
    assert "did not foresee" in str(broken.error)
    assert "ZeroDivisionError" in caplog.text


def test_a_job_runs_with_the_context_of_whoever_asked() -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    variable.set(7)
    job = jobs.ask("key", lambda: [variable.get(), variable.set(8)], "heads", "model")
    assert job.ended.wait(LONG)
    assert job.result[0] == variable.get() == 7


def test_steps_and_the_rest_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    job = jobs.Job("key", lambda: None, "heads", "model", running=True, begun=100.0)
    job.tell("loss", 0, 8, "head")
    now[0] = 102.0
    assert job.rest is None
    job.tell("loss", 2, 8, "head")
    assert (job.rest, job.seconds) == (6.0, 2.0)
    job.tell("runs", 0, 10, "run")  # the next part of the work
    now[0] = 103.0
    job.tell("runs", 5, 10, "run")
    assert (job.rest, job.seconds) == (1.0, 3.0)


def test_light_work_does_not_wait_for_long_work_on_its_model():
    held_up, done = threading.Event(), []
    long = jobs.ask(("long", "of a model"), lambda: int(held_up.wait(60)), "long work", "a model")
    waits = jobs.ask(("long", "that waits"), lambda: 1, "more long work", "a model")
    light = jobs.ask(
        ("light", "of a model"), lambda: done.append(1) or 2, "light work", "a model", lane="light"
    )
    assert light.ended.wait(30)
    assert light.result == 2
    assert not long.ended.is_set()
    assert not waits.running
    held_up.set()
    assert waits.ended.wait(30)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a priority per thread")
def test_pages_come_before_jobs_but_not_before_short_runs() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: list[int] = []

    def in_a_server_that_is_nice() -> None:
        os.nice(7)
        for lane in ("long", "run", "short run"):
            job = jobs.ask(f"niceness of {lane}", lambda: [niceness()], "a priority", "m", lane=lane)
            job.ended.wait(LONG)
            found.append(job.result[0])

    usual = niceness()
    thread = threading.Thread(target=in_a_server_that_is_nice)
    thread.start()
    thread.join()
    assert [n - usual - 7 for n in found] == [jobs.NICENESS, jobs.NICENESS, 0]
