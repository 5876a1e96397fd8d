"""Signed terms of a sum as bars, the largest first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.labels import cut, escaped, visible
from headwater.dashboard.figures.style import AFTER, BEFORE, finish

LEAST = 1e-4  # of the largest term: what is smaller is rounding, and left out


def term_bars(
    names: Sequence[str], values: np.ndarray, title: str, unit: str, subtitle: str = ""
) -> go.Figure:
    """One bar a term, from zero to the right where it adds and to the left where it takes away."""
    values = np.asarray(values, dtype=np.float32)
    seen = np.abs(values) >= LEAST * np.abs(values).max(initial=0.0)
    names, values = [name for name, kept in zip(names, seen, strict=True) if kept], values[seen]
    places = np.arange(len(names))
    figure = go.Figure(
        go.Bar(
            y=places, x=values, orientation="h", showlegend=False, cliponaxis=False, textposition="outside",
            marker_color=[AFTER if value < 0 else BEFORE for value in values],
            text=[f"{value:+.3g}" for value in values], hovertemplate=f"%{{x:+.4g}} {escaped(unit)}<extra></extra>",
        )
    )  # fmt: skip
    labels = [escaped(cut(visible(name), 34)) for name in names]
    figure.update_yaxes(tickvals=places, ticktext=labels, autorange="reversed", showgrid=False)
    reach = 1.2 * float(np.abs(values).max(initial=1e-9))
    low, high = (-reach if (values < 0).any() else 0.0), (reach if (values > 0).any() else 0.0)
    figure.update_xaxes(title=escaped(unit), range=[low, high], zeroline=True)
    return finish(figure, title, subtitle, height=110 + 28 * max(len(names), 2))
