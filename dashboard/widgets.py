"""What every page draws in the same way: safe text, a figure with its numbers, inputs for an analysis' settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from headwater.dashboard.figures import style
from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.tables import to_csv, to_json

CHART = {
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
    "scrollZoom": False,
    "toImageButtonOptions": {"format": "svg", "filename": "headwater"},  # the camera of a figure
}
PAGE = CHART | {
    "toImageButtonOptions": {"format": "png", "scale": 2, "filename": "headwater"}
}  # of a page of its own
WIDE = "wide-"  # begins the keys of figures that a narrow screen scrolls and does not squeeze
MOST_ROWS = 2_000  # more are not sent to the page, but can be downloaded
Drawn = go.Figure | Callable[[], go.Figure] | None


def plain(text: str) -> str:
    """Text that markdown shows letter by letter: no formatting, no links, no pictures, no formulas."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text.replace("\n", " "))


def token_name(tokens: Sequence[str], position: int) -> str:
    return f"{position} {cut(visible(tokens[position]), 24)}"


def quoted(token: str) -> str:
    return f"“{cut(visible(token), 24)}”"


def clicked(figure: go.Figure, key: str, alt: str) -> dict | None:
    """Draw a figure whose points can be clicked; gives the point once per click.

    The key changes with each click handled, since a chart keeps its selection and would report it on every run.
    """
    count = st.session_state.setdefault(f"{key}-clicks", 0)
    with _place(figure, key):
        event = st.plotly_chart(
            figure, key=f"{key}-{count}", on_select="rerun", selection_mode="points", config=CHART, alt=alt
        )
    points = event["selection"]["points"] if event else []
    if not points:
        return None
    st.session_state[f"{key}-clicks"] = count + 1
    return points[0]


def select(label: str, options: Sequence[Any], value: Any, key: str, show: Callable[[Any], str] = str) -> Any:
    """A choice that shows ``value`` also after it was changed elsewhere: by a click on a figure, or on another page."""

    def take() -> None:
        st.session_state[f"{key}-taken"] = True

    # a choice made just now is not in ``value`` yet; a selectbox of another page begins with its first option
    if not st.session_state.pop(f"{key}-taken", False):
        st.session_state[key] = value
    return st.selectbox(label, options, format_func=show, key=key, on_change=take)


def chart(figure: go.Figure, key: str, alt: str) -> None:
    with _place(figure, key):
        st.plotly_chart(figure, key=key, config=CHART, alt=alt)


def _place(figure: go.Figure, key: str):
    wide = cast("go.Layout", figure.layout).meta == style.WIDE
    return st.container(key=f"{WIDE}{key}") if wide else nullcontext()


def numbers(name: str, frame: pd.DataFrame, key: str, figure: Drawn = None) -> None:
    """The numbers behind a figure, folded away: to read, and to download, with the figure as a page of its own.

    Of what is drawn otherwise than by plotly, such as a map on a canvas, `figure` may be a function that makes one.
    """
    with st.expander("Numbers"):
        if len(frame) <= MOST_ROWS:
            st.dataframe(frame, hide_index=True, key=f"{key}-table", alt=f"Numbers of {name}")
        else:
            st.caption(f"{len(frame):,} lines: too many to list here; download them.")
        downloads(name, frame, key, figure)


def downloads(name: str, frame: pd.DataFrame, key: str, figure: Drawn = None) -> None:
    """CSV and JSON of all the numbers, and a page of the figure; the files are made when a button is pressed.

    The camera of a figure saves an SVG here, and a PNG in its own page.
    """
    with st.container(horizontal=True):
        st.download_button(
            "CSV", lambda: to_csv(frame), f"{name}.csv", "text/csv", key=f"{key}-csv", on_click="ignore"
        )
        st.download_button(
            "JSON",
            lambda: to_json(frame),
            f"{name}.json",
            "application/json",
            key=f"{key}-json",
            on_click="ignore",
        )
        if figure is not None:
            st.download_button(
                "HTML",
                lambda: (figure if isinstance(figure, go.Figure) else figure()).to_html(config=PAGE),
                f"{name}.html",
                "text/html",
                key=f"{key}-html",
                on_click="ignore",
                help="a page that needs no network; its camera saves a PNG, the one here an SVG",
            )
