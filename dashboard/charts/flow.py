"""From which tokens an answer comes: strips of several methods on one scale, their curves, the paths of a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from headwater.dashboard.figures.labels import cut, escaped, ticks, token_label, visible
from headwater.dashboard.figures.pictures import OPACITY, pixels
from headwater.dashboard.figures.style import (
    ATTENTION,
    BEFORE,
    CHOSEN,
    DIVERGING,
    GREY,
    INK,
    SEVERAL,
    VEIL,
    WIDE,
    click_layer,
    finish,
    heat,
    outline,
)
from headwater.dashboard.figures.values import limits_of

PER_LINE = 20  # tokens side by side
ACROSS = 5  # pictures side by side
WIDTHS = (1, 2, 3.5, 5.5, 8)  # of edges, in pixels


def strips(
    tokens: Sequence[str],
    places: Sequence[int],
    rows: Mapping[str, np.ndarray],
    title: str,
    unit: str,
    *,
    subtitle: str = "",
    chosen: int | None = None,
    hover: Mapping[str, Sequence[str]] | None = None,
) -> go.Figure:
    """A strip of tokens per row, all on one colour scale; a click reports the position.

    `rows` hold one number for each of `places`, positions in `tokens`. Long strips go on in further lines. Colours run
    from 0, or symmetrically about 0 where a number is negative. NaN cells stay empty.
    """
    count = len(places)
    lines = max(1, -(-count // PER_LINE))
    across = max(1, -(-count // lines))  # lines of equal length
    step = lines + (lines > 1)  # an empty line keeps long strips apart
    grid = np.full((step * len(rows), across), np.nan)
    x, y = np.arange(count) % across, np.arange(count) // across
    text, told, spots = [], [], []
    limits, colours = limits_of(np.concatenate([np.asarray(row, float) for row in rows.values()] or [[]]))
    for n, (name, values) in enumerate(rows.items()):
        grid[n * step + y, x] = values
        more = (hover or {}).get(name, [""] * count)
        for k, place in enumerate(places):
            known = np.isfinite(values[k])
            text.append(escaped(cut(visible(tokens[place]), 9)) if known else "")
            number = f"{values[k]:.4f}" if known else "no value"
            told.append(f"{escaped(name)}<br>{token_label(tokens[place], place)}<br>{number} {unit}{more[k]}")
            spots.append((x[k], n * step + y[k]))
    # of a diverging scale both ends are dark, of the other one the upper end
    flat = np.concatenate([np.asarray(row, float) for row in rows.values()])
    dark = np.abs(np.nan_to_num(flat)) / max(abs(limits[0]), limits[1], 1e-12) > 0.6
    across_of, down = np.array(spots).T
    figure = go.Figure(
        [
            heat(grid, limits, colours if limits[0] < 0 else ATTENTION, unit, xgap=2, ygap=3, hoverinfo="skip"),
            click_layer(
                across_of, down, 10, mode="markers+text", customdata=np.tile(np.asarray(places), len(rows)),
                text=text, textposition="middle center", hovertext=told,
                hovertemplate="%{hovertext}<extra></extra>",
                textfont={"size": 11, "color": ["#fff" if each else INK for each in dark]},
            ),
        ]
    )  # fmt: skip
    if chosen is not None and chosen in places:
        k = list(places).index(chosen)
        for n in range(len(rows)):
            outline(figure, x[k], n * step + y[k], 0.49, 0.46)
    figure.update_xaxes(visible=False, range=[-0.5, across - 0.5])
    figure.update_yaxes(
        range=[len(grid) - 0.5, -0.5], tickvals=[n * step + (lines - 1) / 2 for n in range(len(rows))],
        ticktext=[escaped(name) for name in rows], showgrid=False, zeroline=False,
    )  # fmt: skip
    finish(figure, title, subtitle, height=100 + (34 if lines == 1 else 26) * len(grid))
    return figure.update_layout(hoverdistance=-1, dragmode=False, meta=WIDE)


def over_picture(
    grids: Mapping[str, np.ndarray],
    picture: Any,
    places: np.ndarray,
    title: str,
    unit: str,
    chosen: int | None = None,
) -> go.Figure:
    """A picture per method under its numbers [row, column], all on one colour scale; a click reports the position.

    `picture` is an image as `hw.figure` takes it, None: the numbers alone; `places` [row, column] are positions.
    """
    columns = min(ACROSS, len(grids))
    lines = -(-len(grids) // columns)
    figure = make_subplots(
        lines, columns, subplot_titles=[escaped(name) for name in grids], horizontal_spacing=0.02,
        vertical_spacing=min(0.08, 0.5 / lines),
    )  # fmt: skip
    limits, _ = limits_of(np.concatenate([grid.ravel() for grid in grids.values()]))
    signed = limits[0] < 0
    under = None if picture is None else pixels(picture)
    rows, across = places.shape
    high, wide = (rows, across) if under is None else under.shape[:2]
    x, y = ((np.arange(n) + 0.5) * size / n - 0.5 for n, size in ((across, wide), (rows, high)))
    spots = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    for n, (name, grid) in enumerate(grids.items()):
        where: Any = {"row": n // columns + 1, "col": n % columns + 1}
        if under is not None:
            figure.add_trace(go.Image(z=under, hoverinfo="skip"), **where)
        figure.add_trace(
            go.Heatmap(
                z=grid, x=x, y=y, coloraxis="coloraxis", hoverinfo="skip",
                opacity=OPACITY if signed and under is not None else 1.0,
            ),
            **where,
        )  # fmt: skip
        told = [
            f"{escaped(name)}<br>patch {i},{j} (row, column)<br>{grid[i, j]:.4f} {unit}"
            for i, j in np.ndindex(grid.shape)
        ]
        layer = click_layer(
            spots[:, 0], spots[:, 1], 10, mode="markers", customdata=places.ravel(), hovertext=told,
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(layer, **where)
        if chosen is not None and (places == chosen).any():
            ((i, j),) = np.argwhere(places == chosen)
            figure.add_shape(
                type="rect", x0=x[j] - wide / across / 2, x1=x[j] + wide / across / 2, y0=y[i] - high / rows / 2,
                y1=y[i] + high / rows / 2, line={"color": CHOSEN, "width": 2}, **where,
            )  # fmt: skip
    veil = DIVERGING if signed else (VEIL if under is not None else ATTENTION)
    figure.update_layout(
        coloraxis={"colorscale": veil, "cmin": limits[0], "cmax": limits[1],
                   "colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 14}},
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.5, wide - 0.5], constrain="domain")
    figure.update_yaxes(visible=False, range=[high - 0.5, -0.5])
    for n in range(len(grids)):
        suffix = str(n + 1) if n else ""
        figure.layout[f"yaxis{suffix}"].update(scaleanchor=f"x{suffix}")
    figure.update_annotations(font_size=12)  # names of methods side by side
    finish(figure, title, height=90 + int(np.clip(230 * high / wide, 90, 320)) * lines)
    return figure.update_layout(hoverdistance=-1, dragmode=False, meta=WIDE if columns > 2 else None)


def curves(
    fractions: np.ndarray, lines: Mapping[str, np.ndarray], title: str, unit: str, control: str = "random"
) -> go.Figure:
    """A line per method over the fraction of tokens, the control dashed and grey."""
    figure = go.Figure()
    for n, (name, values) in enumerate(lines.items()):
        style = {"color": GREY, "dash": "dash"} if name == control else {"color": SEVERAL[n % len(SEVERAL)]}
        figure.add_trace(
            go.Scatter(
                x=fractions, y=values, name=escaped(name), mode="lines+markers", line={"width": 2, **style},
                marker={"size": 5}, hovertemplate="%{x:.0%} of the tokens<br>%{y:.4g}",
            )
        )  # fmt: skip
    figure.update_xaxes(title="fraction of the tokens, largest weight first", tickformat=".0%")
    figure.update_yaxes(title=unit)
    figure.update_layout(legend={"orientation": "h", "y": -0.35, "yanchor": "top"})
    return finish(figure, title, height=420)


def paths(
    edges: pd.DataFrame, mass: np.ndarray, tokens: Sequence[str], layers: Sequence[int], title: str,
    subtitle: str = "", chosen: Sequence[int] | None = None,
) -> go.Figure:  # fmt: skip
    """Layers down, positions across: edges as wide as what they carry. A click on the middle of an edge reports its
    depth, query and key; `chosen` marks one."""
    figure = go.Figure()
    lines: list[dict[str, Any]] = edges.to_dict("records")  # type: ignore[assignment]
    largest = max((line["share"] for line in lines), default=1.0)
    size = np.clip(np.ceil(edges["share"].to_numpy() / largest * len(WIDTHS)).astype(int) - 1, 0, None)
    for n, width in enumerate(WIDTHS):
        kept = edges[size == n]
        x, y = (
            (
                np.column_stack([kept[a], kept[b], np.full(len(kept), np.nan)]).ravel()
                for a, b in (("query", "key"), ("depth", "below"))
            )
            if len(kept)
            else ([], [])
        )
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines", line={"width": width, "color": BEFORE}, opacity=0.75, hoverinfo="skip",
                showlegend=False,
            )
        )  # fmt: skip
    depth, place = np.nonzero(mass >= 0.005)
    figure.add_trace(
        go.Scatter(
            x=place, y=depth, mode="markers", showlegend=False,
            marker={"size": 5 + 16 * np.sqrt(mass[depth, place]), "color": SEVERAL[0]},
            text=[f"{token_label(tokens[p], p)}, {_level(d, layers)}<br>{mass[d, p]:.1%} passes here" for d, p in
                  zip(depth.tolist(), place.tolist(), strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=(edges["query"] + edges["key"]) / 2, y=edges["depth"] - 0.5, mode="markers", showlegend=False,
            marker={"size": 9, "color": BEFORE, "symbol": "diamond"},
            customdata=edges[["depth", "query", "key"]].to_numpy(),
            text=[
                f"layer {e['layer']}: {token_label(tokens[int(e['query'])], e['query'])} ← "
                f"{token_label(tokens[int(e['key'])], e['key'])}<br>carries {e['share']:.1%}, weight {e['weight']:.3f}"
                for e in lines
            ],
            hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip
    if chosen is not None:
        figure.add_trace(
            go.Scatter(
                x=[chosen[1], chosen[2]], y=[chosen[0], chosen[0] - 1], mode="lines", hoverinfo="skip",
                line={"width": 4, "color": CHOSEN}, showlegend=False,
            )
        )  # fmt: skip
    places, names = ticks(tokens, np.arange(len(tokens)))
    figure.update_xaxes(
        tickvals=places, ticktext=names, tickangle=-60, range=[-0.7, len(tokens) - 0.3], showgrid=False,
        zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(layers) + 1)), ticktext=[_level(depth, layers) for depth in range(len(layers) + 1)],
        range=[-0.4, len(layers) + 0.4], showgrid=False, zeroline=False,
    )  # fmt: skip
    finish(figure, title, subtitle, height=min(900, 190 + 60 * len(layers)))
    return figure.update_layout(hoverdistance=12, dragmode=False)


def _level(depth: int, layers: Sequence[int]) -> str:
    return f"after {layers[depth - 1]}" if depth else "input"
