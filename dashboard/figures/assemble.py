"""Panels side by side, and a menu that goes through several such views: one figure, complete in one file.

The menu is plotly's own, so a written page keeps it. Its entries hide and show traces and set the axes anew: views
may differ in their number of panels, in tokens and in height. A view's subtitle says which slice it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from headwater.dashboard.figures.labels import cut
from headwater.dashboard.figures.panels import Panel
from headwater.dashboard.figures.style import CHOSEN, finish, title_place

MOST_IN_A_MENU = 24  # entries of a list; more are a slider
GAP, TITLE = 64, 26  # pixels between rows of panels, and for the title of a panel
WIDE = 78  # letters in a line of a title


@dataclass
class View:
    """Panels shown together; `label` is its entry in the menu, `told` what the subtitle says."""

    label: str
    panels: list[Panel]
    told: str = ""


def assemble(views: Sequence[View], title: str, menu: str = "") -> go.Figure:
    """The figure of all views, the first of them shown; `menu` names what the menu goes through."""
    figure = go.Figure()
    layouts = [_layout(view) for view in views]
    for number, view in enumerate(views):
        apart = any(panel.own_axes for panel in view.panels)
        for place, panel in enumerate(view.panels):
            for trace in panel.traces:
                figure.add_trace(_placed(trace, place, layouts[number], number == 0, apart))
    titles = any(panel.title for view in views for panel in view.panels)
    above = _above(title, [view.told for view in views], titles, len(views))
    for layout in layouts:
        layout["height"] = layout.pop("inner") + above + 90
    first = layouts[0]
    finish(figure, wrapped(title), wrapped(views[0].told, 110), height=first["height"])
    for name in {name for layout in layouts for name in layout["axes"]} - set(first["axes"]):
        figure.update_layout({name: {"visible": False}})
    figure.update_layout(**first["axes"], annotations=first["annotations"], barmode="group")
    figure.update_layout(margin={"l": 16, "r": 16, "t": above, "b": 16}, legend={"tracegroupgap": 2})
    if len(views) > 1:
        _add_menu(figure, views, layouts, menu, title, titles)
    return figure


def wrapped(text: str, wide: int = WIDE) -> str:
    """The text in lines of at most `wide` letters."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= wide:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)


def _above(title: str, told: Sequence[str], panel_titles: bool, views: int) -> int:
    """Pixels above the plot: title, subtitle, menu and titles of panels, each in its own band."""
    subtitle = max(wrapped(text, 110).count("<br>") + 1 if text else 0 for text in told)
    menu = 0 if views < 2 else 48 if views <= MOST_IN_A_MENU else 84
    return (
        34 + 22 * (wrapped(title).count("<br>") + 1) + 17 * subtitle + menu + (TITLE if panel_titles else 0)
    )


def _layout(view: View) -> dict[str, Any]:
    """Axes, titles and inner height of a view; places are fractions of the inner height."""
    count = len(view.panels)
    columns = count if count < 4 else 2 if count == 4 else 3
    rows = -(-count // columns)
    tall = [max(panel.height for panel in view.panels[r * columns : (r + 1) * columns]) for r in range(rows)]
    if any("scaleanchor" in panel.y for panel in view.panels):  # as wide as high, so less high where narrow
        tall = [int(height * 1.3 / columns) if columns > 1 else height for height in tall]
    inner = sum(tall) + GAP * (rows - 1)
    axes: dict[str, Any] = {}
    annotations = []
    space = 0.3 if any(panel.own_axes for panel in view.panels) else 0.03
    wide = (1 - space * (columns - 1)) / columns
    for place, panel in enumerate(view.panels):
        row, column = divmod(place, columns)
        top = 1 - (sum(tall[:row]) + GAP * row) / inner
        domain_y = [max(0.0, top - tall[row] / inner), top]
        domain_x = [column * (wide + space), min(1.0, column * (wide + space) + wide)]
        number = "" if place == 0 else str(place + 1)
        if panel.x:
            x, y = {**panel.x}, {**panel.y}
            if place + columns < count:  # a panel below carries the labels
                x |= {"title": {"text": ""}, "showticklabels": False}
            if column and not panel.own_axes:
                y |= {"title": {"text": ""}, "showticklabels": False}
            if "title" in y:
                y["title"] = {"text": cut(y["title"]["text"], tall[row] // 8)}
            if place and panel.shares_y:
                y["matches"] = "y"
            axes[f"xaxis{number}"] = {**x, "domain": domain_x, "anchor": f"y{number}", "automargin": True}
            if "scaleanchor" in y:
                y["scaleanchor"] = f"x{number}"
            axes[f"yaxis{number}"] = {**y, "domain": domain_y, "anchor": f"x{number}", "automargin": True}
        if panel.title:
            annotations.append(
                {
                    "text": panel.title, "x": domain_x[0], "y": top, "xref": "paper", "yref": "paper",
                    "xanchor": "left", "yanchor": "bottom", "showarrow": False, "font": {"size": 12},
                }
            )  # fmt: skip
    return {"axes": axes, "annotations": annotations, "inner": inner}


def _placed(trace: Any, place: int, layout: Mapping[str, Any], visible: bool, apart: bool) -> Any:
    """The trace in its place; one colour scale is enough, and stands beside the panel that it is of."""
    number = "" if place == 0 else str(place + 1)
    trace.visible = visible
    if trace.type == "table":
        return trace
    if trace.type == "heatmap" and apart and not place:
        # the axis of the bars beside it says the unit; a title of its own would lie on that
        trace.colorbar.update(x=layout["axes"]["xaxis"]["domain"][1], title={"text": ""})
    if place and trace.type == "heatmap":
        trace.showscale = False
    if (
        trace.type == "heatmap" and trace.colorbar.title.text
    ):  # plotly would let a long title run out of the figure
        trace.colorbar.title.text = cut(trace.colorbar.title.text, max(20, layout["inner"] // 7))
    if place and trace.type in ("bar", "scatter"):
        trace.showlegend = False
    return trace.update(xaxis=f"x{number}", yaxis=f"y{number}")


def _add_menu(
    figure: go.Figure,
    views: Sequence[View],
    layouts: Sequence[Mapping[str, Any]],
    menu: str,
    title: str,
    titles: bool,
) -> None:
    owners = [number for number, view in enumerate(views) for panel in view.panels for _ in panel.traces]
    flat = [_flattened(layout["axes"]) for layout in layouts]
    every = sorted({key for axes in flat for key in axes})
    names = sorted({name for layout in layouts for name in layout["axes"]})
    entries = []
    for number, view in enumerate(views):
        relayout: dict[str, Any] = {key: flat[number].get(key) for key in every}
        relayout |= {
            f"{name}.visible": layouts[number]["axes"].get(name, {"visible": False}).get("visible", True)
            for name in names
        }
        relayout |= {"height": layouts[number]["height"], "annotations": layouts[number]["annotations"]}
        relayout["title.subtitle.text"] = wrapped(view.told, 110)
        relayout["title.y"] = title_place(wrapped(title), layouts[number]["height"])
        entries.append(
            {
                "label": view.label,
                "method": "update",
                "args": [{"visible": [o == number for o in owners]}, relayout],
            }
        )
    band = TITLE if titles else 0
    if len(views) <= MOST_IN_A_MENU:
        place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": band + 8, "t": 0}}
        figure.update_layout(updatemenus=[{"buttons": entries, "showactive": True, **place}])
        return
    figure.update_layout(
        sliders=[
            {
                "steps": entries, "x": 0, "len": 1, "y": 1, "yanchor": "bottom", "pad": {"b": band, "t": 0},
                "currentvalue": {"prefix": f"{menu} " if menu else "", "font": {"color": CHOSEN, "size": 12}},
                "ticklen": 0, "minorticklen": 0, "font": {"size": 1, "color": "rgba(0,0,0,0)"},
            }
        ]
    )  # fmt: skip


def _flattened(axes: Mapping[str, Any]) -> dict[str, Any]:
    """`{"xaxis": {"title": {"text": t}}}` as `{"xaxis.title.text": t}`, which leaves the rest of the axis alone."""
    found = {}
    for name, settings in axes.items():
        for key, value in settings.items():
            if key == "title":
                found[f"{name}.title.text"] = value["text"]
            else:
                found[f"{name}.{key}"] = value
    return found
