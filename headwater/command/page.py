"""A result as one web page that needs no network: its figures, its tables, and what it must not be used for."""

from __future__ import annotations

import html
from typing import Any

import networkx as nx
import xarray as xr

from headwater.command import output
from headwater.dashboard.figures.figure import figure
from headwater.lens.errors import HeadwaterError

LEFT_OUT = ("question", "unit", "paper", "not_for")  # said above the settings
LOOK = (
    "body{font-family:sans-serif;margin:1.5em}pre,table{font-size:85%}th{text-align:left;padding-right:2em}"
)


def as_page(result: xr.DataArray | xr.Dataset | nx.DiGraph) -> tuple[str, str]:
    """The page, and why it has no figure, if it has none; it holds the numbers all the same."""
    told: dict[str, Any] = dict(result.graph if isinstance(result, nx.DiGraph) else result.attrs)
    drawn, undrawn = "", ""
    try:
        drawn = figure(result).to_html(full_html=False)
    except HeadwaterError as error:
        undrawn = " ".join(str(error).split())
    question = html.escape(str(told.get("question") or getattr(result, "name", None) or "Result"))
    facts = [("unit", told.get("unit")), ("source", told.get("paper")), ("not for", told.get("not_for"))]
    settings = [(key, value) for key, value in told.items() if key not in LEFT_OUT and str(value) != ""]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{question}</title><style>{LOOK}</style>',
        f"<h1>{question}</h1>", _listed(facts), drawn,
        f"<p>Not drawn: {html.escape(undrawn)}</p>" if undrawn else "",
        f"<h2>Numbers</h2><pre>{html.escape(output.as_text(result))}</pre>",
        f"<h2>Settings</h2>{_listed(settings)}</html>",
    ]  # fmt: skip
    return "\n".join(filter(None, parts)), undrawn


def _listed(rows: list[tuple[str, Any]]) -> str:
    cells = (
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in rows
        if value
    )
    return f"<table>{''.join(cells)}</table>"
