"""Figures of arrays whose axes are neither heads nor tokens: a map, curves or bars, labelled by their coordinates."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.style import AFTER, DIVERGING, SEQUENTIAL, finish, heat

CURVES = ("fraction", "step", "edges", "size")  # axes along which a value changes: drawn as lines
MOST = 400  # labels on an axis


def labelled_map(values: xr.DataArray, title: str, unit: str = "") -> go.Figure:
    """A two-dimensional array as a map, first dimension down; curves where one dimension is a running number."""
    running = next((str(name) for name in values.dims if name in CURVES), None)
    if running is not None:
        return _curves(values, running, title, unit)
    down, across = map(str, values.dims)
    numbers = values.values.astype(float)
    known = numbers[np.isfinite(numbers)]
    signed = bool(known.size and known.min() < 0)
    most = float(np.abs(known).max()) if known.size else 1.0
    limits, colours = ((-most, most), DIVERGING) if signed else ((None, None), SEQUENTIAL)
    hover = f"{down} %{{y}}, {across} %{{x}}<br>%{{z:.4g}} {unit}<extra></extra>"
    shown = heat(
        numbers,
        limits,
        colours,
        unit,
        x=_labels(values, across),
        y=_labels(values, down),
        hovertemplate=hover,
    )
    figure = go.Figure(shown)
    figure.update_xaxes(title=across, type="category")
    figure.update_yaxes(title=down, type="category", autorange="reversed")
    return finish(figure, title, height=min(760, 220 + 26 * len(numbers)))


def labelled_bars(values: xr.DataArray, title: str, unit: str = "") -> go.Figure:
    """A one-dimensional array as bars, or as a line where its dimension is a running number."""
    name = str(values.dims[0])
    if name in CURVES:
        return _curves(values.expand_dims("curve"), name, title, unit)
    figure = go.Figure(
        go.Bar(
            x=_labels(values, name), y=values.values.astype(float), marker_color=AFTER,
            hovertemplate=f"{name} %{{x}}<br>%{{y:.4g}} {unit}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title=name, type="category")
    figure.update_yaxes(title=unit)
    return finish(figure, title)


def _curves(values: xr.DataArray, running: str, title: str, unit: str) -> go.Figure:
    other = next(str(name) for name in values.dims if name != running)
    along = values[running].values if running in values.coords else np.arange(values.sizes[running])
    lines = values.transpose(other, running).values.astype(float)
    names = _labels(values, other)
    figure = go.Figure(
        [
            go.Scatter(x=along, y=line, name=name, mode="lines+markers", showlegend=len(lines) > 1)
            for name, line in zip(names, lines, strict=True)
        ]
    )
    figure.update_xaxes(title=running)
    figure.update_yaxes(title=unit)
    return finish(figure, title)


def _labels(values: xr.DataArray, name: str) -> list[str]:
    """Coordinates as text, made distinct by their place where two are equal."""
    if values.sizes[name] > MOST:
        raise ValueError(
            f"{values.sizes[name]} values along {name!r} are too many to label; select up to {MOST}"
        )
    given = values[name].values if name in values.coords else np.arange(values.sizes[name])
    labels = [str(label) for label in given]
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]
