"""`--select` takes one value of an axis; `--html` never costs the text that was computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROLES = ["analyze", "head_roles", "-m"]


@pytest.fixture(scope="module")
def tasks() -> str:
    return "tasks-4l"


def test_a_role_is_selected_and_drawn(headwater, tasks, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    run = headwater(*ROLES, tasks, "--select", "role=induction", "--html", page, "--json")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert "role" not in found["dims"]
    assert found["coords"]["role"]["data"] == "induction"
    assert "plotly" in page.read_text().lower()


def test_what_can_not_be_drawn_is_printed_all_the_same(headwater, tasks, tmp_path: Path) -> None:
    run = headwater(*ROLES, tasks, "--html", tmp_path / "r.html")
    assert run.exit_code == 2
    assert "role" in run.stdout
    assert len(run.stdout.splitlines()) > 3
    assert "--select role=" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("role", "has no value; write role=VALUE"),
        ("roll=induction", "no axis 'roll': did you mean 'role'"),
        ("role=inductive", "role has no 'inductive'; role: "),
        ("head=9", "head has no '9'"),
    ],
)
def test_what_is_not_there_is_one_line(headwater, tasks, chosen: str, words: str) -> None:
    run = headwater(*ROLES, tasks, "--select", chosen)
    assert run.exit_code == 2
    assert words in run.stderr
    assert "induction" in run.stdout, "the whole result, since it is there"
