"""Bars show in a terminal and in a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest
import torch
from tiny_models import tiny

import headwater as hw
from headwater.lens import progress as module
from headwater.lens.progress import progress
from headwater.lens.running import forward


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([1, 2], desc="counting", unit="number")) == [1, 2]
    return stream.getvalue()


def in_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    fake: Any = types.ModuleType("IPython")
    fake.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # without ipywidgets


def test_where_a_bar_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == ""  # a pipe, a file, a batch job
    assert "counting: 100%" in shown(monkeypatch, Terminal())
    in_jupyter(monkeypatch)
    assert "counting: 100%" in shown(monkeypatch, io.StringIO())


def test_a_bar_that_waits_does_not_show_in_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    model = hw.load(tiny("llama"))
    model.record(torch.arange(3, 9)[None])
    assert "record" not in stream.getvalue()
    monkeypatch.setattr(forward, "PATIENCE", 0.0)
    model.record(torch.arange(3, 9)[None])
    assert "3/3" in stream.getvalue()
