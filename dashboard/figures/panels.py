"""One panel of a figure: the traces of an array along one or two axes, and what its axes are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.labels import cut, escaped, visible
from headwater.dashboard.figures.names import names_of, tokens_of
from headwater.dashboard.figures.pooling import MOST_CELLS, pool
from headwater.dashboard.figures.style import BARS, INK, SEVERAL, heat
from headwater.dashboard.figures.values import Shown
from headwater.lens.errors import AnalysisError

MOST_WRITTEN = 400  # cells that carry their word
LONGEST_SIDE = 4096
Bounds = tuple[xr.DataArray, xr.DataArray] | None


@dataclass
class Panel:
    """Traces on one pair of axes; `height` in pixels. A table has no axes: `x` and `y` are empty."""

    traces: list[Any]
    x: dict[str, Any] = field(default_factory=dict)
    y: dict[str, Any] = field(default_factory=dict)
    height: int = 300
    title: str = ""
    remark: str = ""
    aside: str = ""  # what belongs to the panel and has no place on its axes
    shares_y: bool = False  # on the scale of the first panel
    own_axes: bool = False  # labels its axes also where it stands right of another panel


def matrix(part: xr.DataArray, of: Shown) -> Panel:
    """Two axes as rows and columns; a map of more than 512 queries or keys is pooled, and says so."""
    down, across = map(str, part.dims)
    rows, columns = names_of(part, down), names_of(part, across)
    numbers, remark = part.values, ""
    if {down, across} == {"query", "key"} and max(part.shape) > MOST_CELLS:
        pooled = pool(numbers.astype(np.float32), signed=of.limits[0] < 0)
        numbers, rows, columns = pooled.cells, rows[:: pooled.block], columns[:: pooled.block]
        remark = f"each cell is the largest of {pooled.block} × {pooled.block}"
    if max(numbers.shape) > LONGEST_SIDE:
        raise AnalysisError(
            f"{down} × {across} = {part.shape[0]:,} × {part.shape[1]:,} is too large to draw; choose some of them: "
            f"{down if part.shape[0] > part.shape[1] else across}=range({MOST_CELLS})"
        )
    hover = f"{down} %{{y}}<br>{across} %{{x}}<br>%{{z:.4g}} {escaped(of.short_unit)}<extra></extra>"
    gap = 1 if max(numbers.shape) <= 64 else 0
    trace = heat(
        numbers,
        of.limits,
        of.colours,
        of.short_unit,
        x=columns,
        y=rows,
        hovertemplate=hover,
        xgap=gap,
        ygap=gap,
    )
    if of.kind == "flags":
        trace.update(colorbar={"tickvals": [0, 1], "ticktext": ["no", "yes"]})
    x, y = _labelled_axes(part)
    return Panel([trace], x, y, _height(len(numbers)), remark=remark)


def words(part: xr.DataArray) -> Panel:
    """Two axes of words: each cell says its word, and equal words have one colour where they are few."""
    down, across = map(str, part.dims)
    texts = [[escaped(cut(visible(str(word)), 14)) for word in row] for row in part.values]
    kinds = sorted({word for row in texts for word in row})
    codes = np.array([[kinds.index(word) for word in row] for row in texts], dtype=float)
    few = len(kinds) <= len(SEVERAL)
    shades = (
        [[i / max(len(kinds) - 1, 1), SEVERAL[i]] for i in range(len(kinds))] if few else [[0, "#eef1f4"]] * 2
    )
    if not few or len(kinds) == 1:
        shades = [[0, shades[0][1]], [1, shades[-1][1]]]
    trace = go.Heatmap(
        z=codes if few else codes * 0, zmin=0, zmax=max(len(kinds) - 1, 1), colorscale=shades, showscale=False,
        opacity=0.55, x=names_of(part, across), y=names_of(part, down), text=texts, xgap=1, ygap=1,
        texttemplate="%{text}" if part.size <= MOST_WRITTEN else None, textfont={"color": INK},
        hovertemplate=f"{down} %{{y}}<br>{across} %{{x}}<br>%{{text}}<extra></extra>",
    )  # fmt: skip
    x, y = _labelled_axes(part)
    return Panel([trace], x, y, _height(len(codes)))


def lines(part: xr.DataArray, of: Shown, bounds: Bounds, curves: bool) -> Panel:
    """The first axis from left to right as bars, or as curves; a second axis as one colour each."""
    across, *series = map(str, part.dims)
    names = names_of(part, series[0]) if series else [""]
    places: Any = names_of(part, across)
    numeric = curves and across != "layer" and across in part.coords and part[across].dtype.kind in "fiu"
    if numeric:
        places = part[across].values
    traces = []
    for place, name in enumerate(names):
        at = part.isel({series[0]: place}) if series else part
        whiskers = None
        if bounds is not None:
            low, high = (end.isel({series[0]: place}) if series else end for end in bounds)
            whiskers = {
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                "array": (high - at).values, "arrayminus": (at - low).values,
            }  # fmt: skip
        hover = f"{across} %{{x}}<br>%{{y:.4g}} {escaped(of.short_unit)}"
        colour = SEVERAL[place % len(SEVERAL)] if series else BARS
        told: dict[str, Any] = {
            "x": places, "y": at.values, "name": f"{series[0]} {name}" if series else "", "error_y": whiskers,
            "legendgroup": name, "showlegend": bool(series),
            "hovertemplate": f"{hover}<extra>{f'{series[0]} {name}' if series else ''}</extra>",
        }  # fmt: skip
        if curves:
            traces.append(
                go.Scatter(mode="lines+markers", line={"color": colour}, marker={"size": 6}, **told)
            )
        else:
            traces.append(go.Bar(marker={"color": colour}, **told))
    x = {"title": {"text": across}, "type": "linear" if numeric else "category", "tickangle": None}
    if not numeric:
        x["tickangle"] = -60 if tokens_of(part, across) is not None else None
    y: dict[str, Any] = {"title": {"text": escaped(of.short_unit)}, "zeroline": True}
    if of.kind == "flags":
        y |= {"tickvals": [0, 1], "ticktext": ["no", "yes"]}
    return Panel(traces, x, y, 300, shares_y=True)


def table(columns: dict[str, Sequence[Any]]) -> Panel:
    """Columns of words and numbers, one row each; it has no axes."""
    cells = [
        [f"{value:.4g}" if isinstance(value, float | np.floating) else escaped(visible(str(value))) for value in column]
        for column in columns.values()
    ]  # fmt: skip
    header = {
        "values": [f"<b>{escaped(name)}</b>" for name in columns],
        "align": "left",
        "fill_color": "#eef1f4",
        "font": {"color": INK},
    }
    rows = max((len(column) for column in cells), default=0)
    body = {"values": cells, "align": "left", "fill_color": "white", "font": {"color": INK}, "height": 24}
    return Panel([go.Table(header=header, cells=body)], height=int(np.clip(60 + 24 * rows, 120, 560)))


def note(text: str) -> Panel:
    """Where there is nothing to draw: a panel that says so."""
    trace = go.Scatter(
        x=[0],
        y=[0],
        mode="text",
        text=[escaped(text)],
        showlegend=False,
        hoverinfo="skip",
        textfont={"size": 14},
    )
    bare: dict[str, Any] = {"visible": False}
    return Panel([trace], dict(bare), dict(bare), 160)


def _labelled_axes(part: xr.DataArray) -> tuple[dict[str, Any], dict[str, Any]]:
    down, across = map(str, part.dims)
    plain: dict[str, Any] = {"type": "category", "showgrid": False, "zeroline": False}
    slanted = tokens_of(part, across) is not None
    x = {**plain, "title": {"text": across}, "tickangle": -60 if slanted else None}
    return x, {**plain, "title": {"text": down}, "autorange": "reversed"}


def _height(rows: int) -> int:
    return int(np.clip(rows * (44 if rows < 5 else 30 if rows < 13 else 18), 140, 640))
