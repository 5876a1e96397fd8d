"""Figures of a corpus: a statistic over all heads, and the distribution of one head."""

from __future__ import annotations

import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from headwater.analyses._corpora.result import Corpus
from headwater.dashboard.figures.style import AFTER, BEFORE, WIDE, finish


def head_of_corpus(corpus: Corpus, layer: int, head: int, statistic: str, title: str = "") -> go.Figure:
    """The deciles of a statistic over the rows of a head, and the share of its weight at each distance."""
    corpus.examples(layer, head)  # a head that is none is refused
    deciles = corpus.deciles(statistic).sel(layer=layer, head=head)
    far = corpus.distances().sel(layer=layer, head=head)
    figure = make_subplots(
        1, 2, subplot_titles=(f"{statistic}: deciles of rows", "share of the weight by distance")
    )
    figure.add_trace(
        go.Scatter(
            x=deciles.decile.values * 100, y=deciles.values, mode="lines+markers", line={"color": AFTER},
            error_y={"type": "data", "array": deciles.error.values, "thickness": 0.6}, showlegend=False,
            hovertemplate="%{x:.0f} % of rows are below %{y:.4g}<extra></extra>",
        ), 1, 1,
    )  # fmt: skip
    figure.add_trace(
        go.Bar(
            x=distance_names(far), y=far.values, marker={"color": BEFORE}, showlegend=False,
            hovertemplate="%{x} tokens away: %{y:.4f}<extra></extra>",
        ), 1, 2,
    )  # fmt: skip
    figure.update_xaxes(title="percent of rows", row=1, col=1)
    figure.update_yaxes(title=str(deciles.attrs["unit"]), row=1, col=1)
    figure.update_xaxes(title="|query − key|", type="category", row=1, col=2)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    told = corpus.state.told
    subtitle = f"{told['texts']:,} texts, {told['tokens']:,} tokens; bars: width of the bin of a decile"
    finish(figure, title or f"Head {layer}.{head} of {corpus.run['model']}", subtitle, height=400)
    return figure.update_layout(margin={"t": 105}, meta=WIDE)  # the panels have titles too


def distance_names(far: xr.DataArray) -> list[str]:
    """The bins of distances as a reader names them: 0, 1, 2–3, 4–7."""
    ends = zip(far.low.values.astype(int), far.high.values.astype(int), strict=True)
    return [f"{low}" if high - low == 1 else f"{low}–{high - 1}" for low, high in ends]
