"""The measure while heads are removed, with the band of random orders."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.style import AFTER, BEFORE, finish


def pruning_figure(found: xr.Dataset, label: str, unit: str) -> go.Figure:
    """What `prune_heads` found: the measure by the share of heads removed, and lowest to highest of random orders."""
    gone = found["fraction"].values * 100
    figure = go.Figure()
    if found.sizes["control"]:
        random = found["random"].transpose("control", "fraction").values
        low, high = np.nanmin(random, 0), np.nanmax(random, 0)
        line = {"width": 0}
        figure.add_trace(
            go.Scatter(x=gone, y=high, mode="lines", line=line, hoverinfo="skip", showlegend=False)
        )
        figure.add_trace(
            go.Scatter(
                x=gone, y=low, mode="lines", line=line, fill="tonexty", fillcolor="rgba(91,112,131,0.25)",
                name=f"{len(random)} random orders", customdata=high,
                hovertemplate="random orders %{y:.4g} to %{customdata:.4g}<extra></extra>",
            )
        )  # fmt: skip
        middle = {"color": BEFORE, "dash": "dot"}
        figure.add_trace(
            go.Scatter(
                x=gone,
                y=np.nanmean(random, 0),
                mode="lines",
                line=middle,
                name="their mean",
                hoverinfo="skip",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=gone, y=found["measure"].values, mode="lines+markers", line={"color": AFTER},
            name="least helpful heads first", customdata=found["heads_left"].values,
            hovertemplate="%{x:.0f} % removed, %{customdata} heads left<br>%{y:.4g} " + unit + "<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="heads removed, %")
    figure.update_yaxes(title=unit or "measure")
    finish(figure, label, height=380)
    return figure.update_layout(legend={"orientation": "h", "y": -0.25})
