"""No analysis fails in another way than by refusing, on a small set of architectures; the whole set is `make matrix`.

What each analysis is given stands in `matrix_calls.py`; its numbers are held to `matrix_oracles.py`, which works on
`matrix_plain.py`, and to `matrix_values.py`; `matrix_page.py` writes the table. Seen to fail: a raw error of an
analysis, gates that were put on a model that can only be read and did nothing, a page that promised too much.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from headwater.analyses._catalogue.catalogue import catalogue
from headwater.command import matrix, matrix_calls, matrix_page
from headwater.command.cli import app
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
CALL = matrix_calls.call
ROWS = (
    "gpt2",
    "mistral",
    "qwen3_next",
    "llama_lora",
    "bert_classifier",
    "t5",
    "t5/cross",
    "gptj",
    "vit",
    "llava",
)


QUICK = ("gpt2", "vit")


@pytest.mark.parametrize(
    "row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)
def test_every_analysis_is_right_or_refused(row):
    cells = matrix.measure([row])
    assert len(cells) == len(catalogue())
    assert [cell for cell in cells if cell.state in ("wrong", "error", "not tried")] == []
    stated = matrix_page.read(PAGE.read_text(encoding="utf-8"))
    promised = {name for (of, name), mark in stated.items() if of == row and mark == "✓"}
    assert promised == {cell.analysis for cell in cells if cell.state == "right"}


def test_the_page_has_every_family_and_every_analysis():
    stated = matrix_page.read(PAGE.read_text(encoding="utf-8"))
    assert set(stated) == {(row, name) for row in matrix_calls.names() for name in catalogue()}
    assert set(matrix_calls.names()) >= set(zoo.FAMILIES)
    assert [cell for cell, mark in stated.items() if mark in "✗–"] == []


def replaced(monkeypatch, name, change):
    """The analysis `name`, with `change` made to its result."""
    monkeypatch.setattr(matrix_calls, "call", lambda asked, of: change(CALL(asked, of)))
    (cell,) = matrix.measure(["gpt2"], [name])
    return cell


def refuse(result):
    raise AnalysisError("no")


def test_what_a_cell_says(monkeypatch):
    asked = {"monkeypatch": monkeypatch, "name": "rollout"}
    assert replaced(**asked, change=lambda result: result).state == "right"
    assert replaced(**asked, change=lambda result: result * 1.01).state == "wrong"
    assert replaced(**asked, change=lambda result: result * float("nan")).state == "wrong"
    assert replaced(**asked, change=lambda result: result.isel(key=[0, 1])).state == "wrong"
    assert replaced(**asked, change=refuse).line == "no"
    failed = replaced(**asked, change=lambda result: result.sel(query=99))
    assert failed.state == "error"
    assert failed.line.startswith("KeyError: ")


def test_the_command_writes_the_page_and_goes_on_from_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix_calls, "names", lambda: ["vit"])
    page, journal = tmp_path / "page.md", tmp_path / "cells"
    asked = ["doctor", "--matrix", "--write", str(page), "--resume", str(journal)]
    first = CliRunner().invoke(app, asked)
    assert first.exit_code == 0, first.output
    assert "ViT" in first.output
    stated = matrix_page.read(page.read_text(encoding="utf-8"))
    assert stated["vit", "rollout"] == "✓"
    assert stated["vit", "logit_lens"].isdigit()
    monkeypatch.setattr(matrix_calls, "call", refuse)
    assert CliRunner().invoke(app, asked).output == first.output


def test_a_failure_is_told_and_counts(monkeypatch):
    monkeypatch.setattr(matrix_calls, "names", lambda: ["vit"])
    monkeypatch.setattr(matrix_calls, "call", lambda asked, of: 1 / 0)
    found = CliRunner().invoke(app, ["doctor", "--matrix"])
    assert found.exit_code == 1
    assert "headwater: rollout on ViT: ZeroDivisionError" in found.stderr
