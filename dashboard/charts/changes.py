"""How a run changed: answers as dumbbells, the loss over a long text, a sweep over strengths, random controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.labels import cut, escaped, ticks, visible
from headwater.dashboard.figures.style import AFTER, BEFORE, CHOSEN, finish

LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}


def dumbbells(labels: Sequence[str], a: np.ndarray, b: np.ndarray, unit: str, title: str) -> go.Figure:
    """Two numbers of each answer, A and B, joined by a line; the axis is scaled to them."""
    a, b, place = np.asarray(a, float), np.asarray(b, float), np.arange(len(labels))
    gaps = np.full(len(a), np.nan)
    line = {"color": BEFORE, "width": 3}
    joined = go.Scatter(
        x=np.column_stack([a, b, gaps]).ravel(), y=np.repeat(place, 3), mode="lines", line=line, opacity=0.5,
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure = go.Figure([joined])
    for name, numbers, colour, symbol in (("A", a, BEFORE, "circle-open"), ("B", b, AFTER, "circle")):
        figure.add_trace(
            go.Scatter(x=numbers, y=place, mode="markers", name=name, hovertemplate=f"{name} %{{x:.4g}}<extra></extra>",
                       marker={"size": 12, "color": colour, "symbol": symbol, "line": {"width": 2.5, "color": colour}})
        )  # fmt: skip
    figure.update_yaxes(
        tickvals=place, ticktext=[escaped(cut(visible(label))) for label in labels], range=[len(labels) - 0.5, -0.5]
    )  # fmt: skip
    low, high = float(min(a.min(), b.min())), float(max(a.max(), b.max()))
    rim = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    figure.update_xaxes(title=unit, range=[low - rim, high + rim], zeroline=False)
    figure.update_layout(legend=LEGEND)
    return finish(figure, title, height=120 + 28 * len(labels))


def loss_changes(a: np.ndarray, b: np.ndarray, tokens: Sequence[str], title: str) -> go.Figure:
    """The change of each token's loss over a long text."""
    change = np.asarray(b, float) - np.asarray(a, float)
    line = go.Scatter(
        x0=0, dx=1, y=change.astype(np.float32), mode="lines", line={"color": AFTER},
        hovertemplate="token %{x}: %{y:+.4g} nats<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(line)
    places, text = ticks(tokens, np.arange(len(tokens)))
    figure.update_xaxes(tickvals=places, ticktext=text, tickangle=-60)
    figure.update_yaxes(title="change of loss, nats")
    return finish(figure, title, height=340)


def sweep_curve(
    strengths: np.ndarray, mean: np.ndarray, interval: tuple[np.ndarray, np.ndarray], plain: float, now: float,
    strength: str, measure: str, title: str, subtitle: str = "",
) -> go.Figure:  # fmt: skip
    """The measure at each strength with its interval, the measure without edits as a line; a click gives a strength."""
    low, high = interval
    points = go.Scatter(
        x=strengths, y=mean, mode="lines+markers", name="B", line={"color": AFTER}, marker={"size": 10},
        hovertemplate="%{x:.4g}: %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure()
    if np.any(high > low):
        figure.add_trace(
            go.Scatter(x=np.concatenate([strengths, strengths[::-1]]), y=np.concatenate([high, low[::-1]]),
                       fill="toself", mode="lines", line={"width": 0, "color": AFTER}, opacity=0.25,
                       name="95 % interval", hoverinfo="skip")
        )  # fmt: skip
    figure.add_trace(points)
    figure.add_hline(y=plain, line={"color": BEFORE, "dash": "dash"}, annotation_text="A")
    figure.add_vline(x=now, line={"color": CHOSEN, "width": 1})
    figure.update_xaxes(title=escaped(strength))
    figure.update_yaxes(title=escaped(cut(measure, 44)))
    figure.update_layout(legend=LEGEND, showlegend=bool(np.any(high > low)))
    return finish(figure, title, subtitle, height=380)


def control_band(controls: np.ndarray, plain: float, edited: float, measure: str, title: str) -> go.Figure:
    """The measure under random controls as points over their band (5 to 95 %), beside that of A and of B."""
    known = controls[np.isfinite(controls)]
    figure = go.Figure()
    if known.size:
        low, high = np.quantile(known, (0.05, 0.95))
        figure.add_vrect(x0=low, x1=high, fillcolor=BEFORE, opacity=0.2, line_width=0)
        spread = (np.arange(known.size) % 5 - 2) * 0.08
        figure.add_trace(
            go.Scatter(x=known, y=spread, mode="markers", name="random controls",
                       hovertemplate="%{x:.4g}<extra></extra>", marker={"color": BEFORE, "size": 8})
        )  # fmt: skip
    for name, value, colour in (("A", plain, BEFORE), ("B", edited, AFTER)):
        figure.add_vline(x=value, line={"color": colour, "width": 2}, annotation_text=name)
    figure.update_yaxes(visible=False, range=[-0.5, 0.5])
    figure.update_xaxes(title=escaped(cut(measure, 60)), zeroline=False)
    return finish(figure, title, "shaded: 5 to 95 % of the controls", height=230)
