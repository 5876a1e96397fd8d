"""A view as one web page that needs no network: measure, edits, likeliest answers, maps of pinned heads."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

import headwater as hw
from headwater.dashboard.figures.labels import visible
from headwater.dashboard.running import runs
from headwater.dashboard.running.measure import Measure, likeliest
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State

LISTED = 10  # answers
MOST_HEADS = 24  # whose maps a page can hold
LOOK = (
    "body{font-family:sans-serif;margin:1.5em;max-width:75em}th{text-align:left}td,th{padding-right:2em}"
    "pre{white-space:pre-wrap}"
)


def report(state: State, chosen: Measure, changes: Sequence[str]) -> str:
    """The page. `changes` are the edits of run B in words."""
    one, other = chosen.plain, runs.b(state)
    shown = {"A": one} if other is None else {"A": one, "B": other}
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Headwater</title><style>{LOOK}</style>',
        f"<h1>{_safe(state.model)}</h1>",
        f"<pre>{_safe(state.text or state.picture)}</pre>",
        f"<h2>{_safe(chosen.label)}</h2>",
        _table([(f"run {name}", _number(chosen.value(run), chosen.unit)) for name, run in shown.items()]),
    ]
    if other is not None:
        words = [*changes, *(["another text: " + state.b_text] if state.b_text is not None else [])]
        words += [f"another model: {state.b_model}"] if state.b_model is not None else []
        parts += ["<h2>Run B</h2><ul>", *(f"<li>{_safe(each)}</li>" for each in words), "</ul>"]
    if one.logits.size:
        parts += ["<h2>Likeliest</h2>", _answers(one, other)]
    parts += ["<h2>Pinned</h2>" if state.pins else "<p>Nothing is pinned.</p>", *_pinned(state, shown)]
    parts += ["<h2>Made with</h2>", _table(_made(state)), "</html>"]
    return "\n".join(parts)


def _answers(one: Run, other: Run | None) -> str:
    numbers = likeliest(one, LISTED)
    rows = []
    known = np.exp(one.log_probabilities())
    second = None
    if other is not None and other.logits.shape == one.logits.shape:
        second = np.exp(other.log_probabilities())
        numbers = list(dict.fromkeys([*numbers, *likeliest(other, LISTED)]))
    for number in numbers:
        told = f"A {known[number]:.4f}" + ("" if second is None else f", B {second[number]:.4f}")
        rows.append((visible(one.label(number)), told))
    return _table(rows)


def _pinned(state: State, shown: dict[str, Run]) -> list[str]:
    """The pinned edges as words, and the maps of the pinned heads; plotly stands in the page once."""
    found = [f"<p>Edge {_safe(name.replace('>', ' → '))}</p>" for name in state.pins if ">" in name]
    heads = [hw.Head.parse(name) for name in state.pins if ">" not in name]
    whole = True
    for head in heads[:MOST_HEADS]:
        for name, run in shown.items():
            if head.layer not in run.layers or head.head >= run.n_heads:
                continue
            drawn = hw.figure(run.record, title=f"Head {head}, run {name}", layer=head.layer, head=head.head)
            found.append(drawn.to_html(full_html=False, include_plotlyjs=whole))
            whole = False
    if len(heads) > MOST_HEADS:
        found.append(f"<p>{len(heads) - MOST_HEADS} more heads are pinned.</p>")
    return found


def _made(state: State) -> list[tuple[str, Any]]:
    names = ("headwater", "torch", "transformers")
    rows: list[tuple[str, Any]] = [("weights", resident(state.model).revision), ("part", state.part)]
    return rows + [(name, version(name)) for name in names]


def _number(value: float | None, unit: str) -> str:
    return "no value" if value is None else f"{value:.6g} {unit}"


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    cells = (f"<tr><th>{_safe(key)}</th><td>{_safe(str(value))}</td></tr>" for key, value in rows if value)
    return f"<table>{''.join(cells)}</table>"


def _safe(text: str) -> str:
    return html.escape(text)
