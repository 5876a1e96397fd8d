"""What the shell offers on Tab, and `--version`.

Seen to fail with the completion functions taken off the options, and with the version not said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import headwater as hw
from headwater.analyses._catalogue.about import listed
from headwater.command.cli import app
from headwater.lens.models.embedded import embedded
from headwater.lens.trained import registry
from headwater.lens.trained.joined import joined


def offered(typed: str) -> list[str]:
    """The words that bash is given for the last word of `typed`."""
    words = typed.split(" ")
    place = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1), "_HEADWATER_COMPLETE": "complete_bash"}
    run = CliRunner().invoke(app, [], env=place, prog_name="headwater")
    assert run.exit_code == 0, run.output
    return run.stdout.split()


def test_commands_analyses_and_models_are_offered() -> None:
    assert offered("headwater ana") == ["analyze"]
    assert offered("headwater analyze rollo") == ["rollout"]
    assert offered("headwater analyze ") == list(listed())
    assert "sink-2l-kvbias" in offered("headwater record --model sink-")
    for typed in (
        "headwater analyze rollout -m ",
        "headwater dashboard ",
        "headwater record -m ",
        "headwater experiment x.json -m ",
    ):
        assert set(offered(typed)) >= set(embedded())


def test_trained_models_are_offered_where_they_are_and_where_they_are_not(monkeypatch) -> None:
    monkeypatch.setattr(registry, "is_added", lambda name: name == "minilm")
    assert set(offered("headwater models add ")) == {*registry.TRAINED, *joined()} - {"minilm"}
    assert offered("headwater models rm ") == ["minilm"]
    assert set(offered("headwater record -m ")) == {*embedded(), "minilm"}


def test_files_are_left_to_the_shell() -> None:
    for typed in (
        "headwater verify do",
        "headwater record --file do",
        "headwater analyze rollout --record do",
        "headwater record --image do",
        "headwater analyze rollout --audio do",
    ):
        assert offered(typed) == []


@pytest.mark.slow
def test_bash_takes_the_script() -> None:
    """The script that `--install-completion` writes, sourced in bash, which then completes a line."""
    line = (
        'eval "$(_HEADWATER_COMPLETE=source_bash headwater)"; COMP_WORDS=(headwater analyze rollo); COMP_CWORD=2; '
        '_headwater_completion headwater; echo "${COMPREPLY[@]}"'
    )
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "--norc", "-c", line],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": paths},
    )
    assert (run.stdout.strip(), run.stderr) == ("rollout", "")


def test_the_version_is_said(headwater) -> None:
    assert headwater("--version").stdout == f"headwater {hw.__version__}\n"
