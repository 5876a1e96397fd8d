"""A view as one web page that needs no network: measure, edits, likeliest answers, what is pinned.

Names and words come from strangers. Each is escaped, and the page's policy lets no script run but those of its own
figures, and nothing be asked of any other machine.
"""

from __future__ import annotations

import html
import secrets
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import plotly.graph_objects as go

import headwater as hw
from headwater.dashboard.figures.labels import readable, visible
from headwater.dashboard.running import catalogue, runs
from headwater.dashboard.running.measure import Measure, likeliest
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.pinned import Pinned, pinned
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError

LISTED = 10  # answers
MOST_HEADS = 24  # whose maps a page can hold
MOST_ROWS = 200  # of a table of numbers
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
LOOK = (
    "body{font-family:sans-serif;margin:1.5em;max-width:75em}th{text-align:left}td,th{padding-right:2em}"
    "pre{white-space:pre-wrap}"
)


def report(state: State, chosen: Measure, changes: Sequence[str]) -> str:
    """The page. `changes` are the edits of run B in words."""
    one, other, own = chosen.plain, runs.b(state), secrets.token_hex(16)
    shown = {"A": one} if other is None else {"A": one, "B": other}
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(own)}">',
        f"<title>Headwater</title><style>{LOOK}</style>",
        f"<h1>{_safe(state.model)}</h1>",
        f"<pre>{_lines(state.text or state.picture)}</pre>",
        f"<h2>{_safe(chosen.label)}</h2>",
        _table([(f"run {name}", _number(chosen.value(run), chosen.unit)) for name, run in shown.items()]),
    ]
    if other is not None:
        words = [*changes, *(["another text: " + state.b_text] if state.b_text is not None else [])]
        words += [f"another model: {state.b_model}"] if state.b_model is not None else []
        parts += ["<h2>Run B</h2><ul>", *(f"<li>{_safe(each)}</li>" for each in words), "</ul>"]
    if one.logits.size:
        parts += ["<h2>Likeliest</h2>", _answers(one, other)]
    figures = _Figures(own)
    results = pinned(state, runs.shown(state), chosen)
    parts += ["<h2>Pinned</h2>" if state.pins or results else "<p>Nothing is pinned.</p>"]
    parts += _heads(state, shown, figures)
    parts += [line for each in results for line in _result(each, runs.shown(state), figures)]
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


class _Figures:
    """Figures as HTML. Plotly stands in the page once; `own` marks the scripts that the page's policy lets run."""

    def __init__(self, own: str) -> None:
        self.own, self.whole = own, True

    def __call__(self, figure: go.Figure) -> str:
        drawn = figure.to_html(full_html=False, include_plotlyjs=self.whole)
        self.whole = False
        return drawn.replace("<script", f"<script nonce={self.own}")


def _heads(state: State, shown: dict[str, Run], figures: _Figures) -> list[str]:
    """The pinned edges as words, and the maps of the pinned heads."""
    found = [f"<p>Edge {_safe(name.replace('>', ' → '))}</p>" for name in state.pins if ">" in name]
    heads = [hw.Head.parse(name) for name in state.pins if ">" not in name]
    for head in heads[:MOST_HEADS]:
        for name, run in shown.items():
            if head.layer not in run.layers or head.head >= run.n_heads:
                continue
            title = f"Head {head}, run {name}"
            found.append(figures(hw.figure(run.record, title=title, layer=head.layer, head=head.head)))
    if len(heads) > MOST_HEADS:
        found.append(f"<p>{len(heads) - MOST_HEADS} more heads are pinned.</p>")
    return found


def _result(each: Pinned, run: Run, figures: _Figures) -> list[str]:
    """A pinned result of the catalogue: its question, its figure, its numbers, and what it may not be used for."""
    about = each.asked
    found = [
        f"<h3>{_safe(about.question)}</h3>",
        f"<p>{_safe(f'{each.told}; {about.unit}. Source: {about.paper}. Not for: {about.not_for}.')}</p>",
    ]
    result = each.result
    if result is None:
        why = each.why or "it was not computed before this page was made"
        return [*found, f"<p>No result: {_safe(why)}.</p>"]
    try:
        found.append(figures(catalogue.figure_of(result, run)))
    except HeadwaterError as error:
        found.append(f"<p>No figure: {_safe(str(error))}.</p>")
    frame = catalogue.table(result)
    more = f"; the first {MOST_ROWS} of {len(frame):,} lines" if len(frame) > MOST_ROWS else ""
    rows = frame.head(MOST_ROWS).map(lambda cell: f"{cell:.6g}" if isinstance(cell, float) else str(cell))
    cells = [list(map(str, frame.columns)), *rows.to_numpy().tolist()]
    lines = (f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in cells)
    seen = f"{_safe(catalogue.seen(frame))}{more}"
    return [*found, f"<details><summary>Numbers, {seen}</summary><table>{''.join(lines)}</table></details>"]


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
    return html.escape(readable(text))


def _lines(text: str) -> str:
    return "\n".join(_safe(line) for line in text.split("\n"))
