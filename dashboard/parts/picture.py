"""One head's weights over the picture that the model reads, and the tokens that look at a region of it."""

from __future__ import annotations

import streamlit as st

import headwater as hw
from headwater.dashboard import tables
from headwater.dashboard.running import picture
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound
from headwater.dashboard.state.state import State
from headwater.dashboard.tables import extremes
from headwater.dashboard.widgets import chart, numbers, plain, quoted
from headwater.lens.errors import HeadwaterError


def draw(state: State, run: Run, query: int) -> None:
    """Nothing for a run without patches."""
    shape = picture.grid(run)
    if shape is None:
        return
    st.subheader("On the picture")
    left, right = st.columns([3, 2], gap="large")
    frames, rows, columns = shape
    told = f"head {state.layer}.{state.head}"
    with left:
        try:
            found = picture.word(run, query, state.layer, state.head)
        except HeadwaterError as error:  # a token that sees no patch
            st.caption(plain(str(error)))
        else:
            drawn = hw.on_grid(found) if frames > 1 else found
            image = None if frames > 1 else picture.pixels(run)
            named = quoted(run.queries[query])
            figure = hw.figure(drawn, image=image, title=f"{named}, {told}")
            frame = tables.table(found, "weight")
            chart(figure, "on-picture", f"Weights of {named} on patches; {extremes(frame, 'weight')}")
            numbers("word-on-picture", frame, "picture-numbers", figure)
    if frames > 1 or not picture.has_words(run):
        return
    with right:
        down = (
            bound.slider(state, "head.rows", "Rows of patches", 0, rows - 1, (0, rows - 1))
            if rows > 1
            else (0, 0)
        )
        across = (
            bound.slider(state, "head.columns", "Columns of patches", 0, columns - 1, (0, columns - 1))
            if columns > 1
            else (0, 0)
        )
        try:
            bars = picture.region(run, (down[0], across[0], down[1], across[1]), state.layer, state.head)
        except HeadwaterError as error:
            st.caption(plain(str(error)))
            return
        place = f"rows {down[0]} to {down[1]}, columns {across[0]} to {across[1]}"
        figure, frame = hw.figure(bars, title=f"Words of the region, {told}"), tables.table(bars, "weight")
        chart(figure, "region-words", f"Words of {place}; {extremes(frame, 'weight')}")
        numbers("region-words", frame, "region-numbers", figure)
