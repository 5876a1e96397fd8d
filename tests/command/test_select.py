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


def test_a_page_holds_figure_table_and_what_it_is_not_for(headwater, tasks, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    run = headwater(*ROLES, tasks, "--html", page)
    assert run.exit_code == 0, run.stderr
    text = page.read_text()
    for word in (
        "role previous",
        "<th>not for</th>",
        "<th>sequences</th>",
        "mean attention weight",
        "<h2>Numbers</h2>",
    ):
        assert word in text, word
    assert run.stdout.splitlines()[3] in text


def test_what_can_not_be_drawn_is_printed_and_written_all_the_same(
    headwater, tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwater.command import page
    from headwater.lens.errors import AnalysisError

    def refuse(result: object) -> None:
        raise AnalysisError("too large to draw")

    monkeypatch.setattr(page, "figure", refuse)
    run = headwater(*ROLES, tasks, "--html", tmp_path / "r.html")
    assert run.exit_code == 2
    assert len(run.stdout.splitlines()) > 3
    assert run.stderr == "headwater: not drawn: too large to draw\n"
    assert run.stdout.splitlines()[3] in (tmp_path / "r.html").read_text()


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
