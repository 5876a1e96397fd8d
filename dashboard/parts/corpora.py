"""The pieces of the page Corpus: a finder of heads, what one head does, and its strongest examples."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import streamlit as st

import headwater as hw
from headwater.analyses._corpora.result import Strong
from headwater.analyses._corpora.statistics import NAMES, STATISTICS
from headwater.dashboard.canvas.grid import grid
from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.state import State
from headwater.dashboard.tables import table
from headwater.dashboard.widgets import chart, numbers, plain

AROUND = 10  # tokens shown on each side of an end
DECILES = (0.1, 0.5, 0.9)
TILES = 2_000  # heads that are drawn as tiles; more are listed alone


def choose(state: State, found: hw.Corpus) -> tuple[str, tuple[int, int]]:
    """The statistic by which heads are ranked, and the head that is looked at: the first of them where none is."""
    by = bound.choice(
        state, "corpus.by", "Rank heads by", list(NAMES), "weight", width=260,
        show=lambda name: name.replace("_", " "),
    )  # fmt: skip
    first = found.find(by, 1).index
    default = first[0] if len(first) else (found.layers[0], 0)
    layer = bound.fitting(state, "corpus.layer", found.layers, default[0])
    head = bound.fitting(state, "corpus.head", list(range(found.heads)), default[1])
    return by, (int(layer), int(head))


def take(event: dict[str, Any]) -> None:
    """A click on a tile chooses its head."""
    if "head" in event:
        _choose(*event["head"])


def _choose(layer: int, head: int) -> None:
    state = session.current()
    state.put("corpus.layer", int(layer))
    state.put("corpus.head", int(head))
    session.touch()


def draw_finder(state: State, found: hw.Corpus, by: str, chosen: tuple[int, int]) -> None:
    """All heads as tiles, and ranked in a table that layers filter."""
    about = STATISTICS[by]
    st.caption(plain(f"{by.replace('_', ' ')}: {about.about}; mean over rows, in {about.kind}."))
    left, right = st.columns(2)
    with right:
        only = bound.several(state, "corpus.layers", "Only of layers", found.layers)
        lowest = bound.toggle(state, "corpus.lowest", "Lowest first")
        frame = ranked(found, by, only, lowest)
        _table(frame, chosen)
    with left:
        means = found.mean(by)
        if len(found.layers) * found.heads <= TILES:
            title = f"{by.replace('_', ' ')}, mean"
            grid(means, key="corpus_grid", title=title, unit=about.kind, chosen=chosen, on_event=take)
        numbers("heads-of-corpus", table(means, by), "corpus-numbers", lambda: found.figure(by))


def ranked(found: hw.Corpus, by: str, only: list[int], lowest: bool) -> pd.DataFrame:
    """Every head with its mean and deciles, the largest mean first."""
    frame = found.find(by, len(found.layers) * found.heads, lowest=lowest).reset_index()
    if only:
        frame = frame.loc[frame["layer"].isin(only)]
    layers, heads = (np.asarray(frame[name], int) for name in ("layer", "head"))
    names = [f"{layer}.{head}" for layer, head in zip(layers.tolist(), heads.tolist(), strict=True)]
    out = pd.DataFrame({"head": names, "mean": np.asarray(frame[by])})
    deciles = found.deciles(by).transpose("decile", "layer", "head")
    rows = np.searchsorted(found.layers, layers)
    for part in DECILES:
        out[f"{part:.0%}"] = deciles.sel(decile=part, method="nearest").values[rows, heads]
    return out


def _table(frame: pd.DataFrame, chosen: tuple[int, int]) -> None:
    key = f"corpus-table-{crc32(' '.join(frame['head']).encode())}-{chosen[0]}.{chosen[1]}"

    def picked() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows:
            head = hw.Head.parse(frame["head"].iloc[rows[0]])
            _choose(head.layer, head.head)

    st.dataframe(
        frame, key=key, hide_index=True, height=330, on_select=picked, selection_mode="single-row",
        column_config={name: st.column_config.NumberColumn(name, format="%.4f") for name in frame.columns[1:]},
    )  # fmt: skip


def draw_head(found: hw.Corpus, by: str, head: tuple[int, int]) -> None:
    """The distribution of the head, and the tokens at the ends of its weights."""
    figure = found.figure(by, *head)
    deciles = found.deciles(by).sel(layer=head[0], head=head[1])
    middle = float(deciles.sel(decile=0.5))
    told = f"Half of the rows are below {middle:.3g} {deciles.attrs['unit']}."
    chart(figure, "corpus-head", told if np.isfinite(middle) else "No row has a value.")
    frame = pd.DataFrame({"decile": deciles.decile.values, by: deciles.values, "error": deciles.error.values})
    numbers("deciles-of-head", frame, "corpus-head-numbers", figure)
    left, right = st.columns(2)
    for place, side, title in (
        (left, "to", "Tokens that it attends to"),
        (right, "from", "Tokens that attend"),
    ):
        with place:
            st.markdown(f"**{title}**")
            rows = found.tokens(*head, side, 12)  # type: ignore[arg-type]
            frame = pd.DataFrame(rows, columns=["token", "weight"])
            frame["token"] = [cut(visible(token), 24) for token in frame["token"]]
            st.dataframe(frame, hide_index=True, height=250, key=f"corpus-{side}")
    st.caption("Weights are summed over all texts; the first token of a text counts as no key.")


def draw_examples(found: hw.Corpus, by: str, head: tuple[int, int]) -> None:
    """The strongest places, with the words around their two ends."""
    st.subheader(f"Strongest examples of {by.replace('_', ' ')}")
    st.markdown(":orange-background[the token that looks] and :blue-background[the token that it looks at]")
    examples = found.examples(*head, by)
    if not examples:
        st.info("No text has a row in which this is defined.")
    for one in examples:
        with st.container(border=True):
            st.caption(plain(f"{one.value:.4f} · {one.where} · query {one.query}, key {one.key}"))
            st.markdown(lit(one))


def lit(one: Strong) -> str:
    """The words around both ends as markdown that shows every letter as it is, the ends with a ground of colour."""
    ends = [at for at in (one.query, one.key) if 0 <= at < len(one.tokens)]
    near = sorted(
        {at for end in ends for at in range(end - AROUND, end + AROUND + 1) if 0 <= at < len(one.tokens)}
    )
    words, before = [], -1
    for at in near:
        if at != before + 1:
            words.append("…")
        word = plain(cut(visible(one.tokens[at]), 24))
        colour = {(True, True): "violet", (True, False): "orange", (False, True): "blue"}.get(
            (at == one.query, at == one.key)
        )
        words.append(f":{colour}-background[{word}]" if colour else word)
        before = at
    return " ".join([*words, *(["…"] if near and near[-1] < len(one.tokens) - 1 else [])])
