"""A page stands while its runs are made: the bar or its progress, Cancel, and what needs no run goes on."""

from __future__ import annotations

import json
import threading

import pytest
from opened_app import opened, settled

from headwater.dashboard.running import jobs, runs
from headwater.lens.errors import HeadwaterError
from headwater.lens.progress import progress

SLOW, FAST = "When Mary went to the store", "When John went to the store"
EDIT = json.dumps([{"edit": "AblateHeads", "heads": ["0.1"]}])
pytestmark = pytest.mark.usefixtures("offered")


class Held:
    """Runs of one text stand at 1 of 3 layers until they may go on."""

    def __init__(self, text: str, edited: bool, made) -> None:
        self.text, self.edited, self.made = text, edited, made
        self.go, self.calls = threading.Event(), 0

    def __call__(self, name, part, edits, what):
        if what.text == self.text and (edits != "[]") == self.edited:
            self.calls += 1
            with progress(total=3, desc="record", unit="layer") as bar:
                bar.update()
                while not self.go.wait(0.002):
                    bar.update(0)
        return self.made(name, part, edits, what)


@pytest.fixture
def held(monkeypatch, request):
    held = Held(SLOW, request.param, runs._made)
    monkeypatch.setattr(runs, "_made", held)
    monkeypatch.setattr(runs, "_operations", lambda name, what: runs.QUICK * (2 if what.text == SLOW else 0))
    monkeypatch.setattr(runs, "kept", runs.Kept(10**9, least=2))
    monkeypatch.setattr(jobs, "LOOK", 0.0)
    monkeypatch.setattr("headwater.dashboard.parts.job.PATIENCE", 0.2)
    yield held
    held.go.set()
    for job in [*jobs._jobs.values(), *jobs._running.values()]:
        assert job.ended.wait(30)


def words(app) -> str:
    return " ".join(each.value for each in [*app.markdown, *app.caption]).replace("\\", "")


def bars(app) -> list[str]:
    return [each.proto.text.replace("\\", "") for each in app.get("progress")]


@pytest.mark.parametrize("held", [False], indirect=True)
def test_the_page_waits_for_run_a_with_progress_and_others_do_not(held):
    app = opened("head", model="small", prompt=SLOW)
    assert app.text_area(key="bound-text").value == SLOW  # the sidebar is there
    assert any(text.startswith("Run A: 1 of 3 layers") for text in bars(app))
    assert not app.header
    other = opened("head", model="small", prompt=FAST)  # a second visitor, of the same model
    assert other.header[0].value == "Head 0.0"
    held.go.set()
    app = settled(app)
    assert app.header[0].value == "Head 0.0"
    assert held.calls == 1


@pytest.mark.parametrize("held", [False], indirect=True)
def test_cancel_ends_the_run_and_compute_begins_it_again(held):
    app = opened("head", model="small", prompt=SLOW)
    (job,) = [each for each in jobs._jobs.values() if each.what == "run A"]
    next(button for button in app.button if button.label == "Cancel").click().run()
    assert job.ended.wait(30)
    assert job.result is None
    app.run()
    assert "Run A: cancelled." in words(app)
    assert not app.header
    held.go.set()
    next(button for button in app.button if button.label == "Compute").click().run()
    assert settled(app).header[0].value == "Head 0.0"


@pytest.mark.parametrize("held", [True], indirect=True)
def test_a_page_of_run_a_does_not_wait_for_run_b(held):
    app = opened("head", model="small", prompt=SLOW, edits=EDIT)
    assert app.header[0].value == "Head 0.0"
    assert any(text.startswith("Run B: 1 of 3 layers") for text in bars(app))
    assert "→ B" not in words(app)
    app.switch_page("views/edit.py").run()  # the form and the list are there, the rest is not
    assert app.button(key="add-edit")
    assert "The page goes on when run B is there." in words(app)
    assert held.calls == 1
    held.go.set()
    app = settled(app)
    assert "→ B" in words(app)


@pytest.mark.parametrize("held", [False], indirect=True)
def test_a_run_that_fails_is_told_and_can_be_tried_again(held, monkeypatch):
    def fails(*_):
        raise HeadwaterError("no room")

    monkeypatch.setattr(runs, "_made", fails)
    app = opened("head", model="small", prompt=FAST)
    for _ in range(2):  # also when the page is drawn again
        assert [each.value for each in app.error] == ["no room"]
        app.run()
    monkeypatch.setattr(runs, "_made", held.made)
    next(button for button in app.button if button.label == "Try again").click().run()
    assert not app.error
    assert app.header[0].value == "Head 0.0"
