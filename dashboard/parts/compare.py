"""What the page Compare shows: one view of runs A and B, side by side, with one selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import streamlit as st

from headwater.dashboard.canvas.attention_map import attention_map
from headwater.dashboard.canvas.grid import grid
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.figures.tokens import token_bars
from headwater.dashboard.parts import attention
from headwater.dashboard.running import compare, scores, sinks
from headwater.dashboard.running.compare import Aligned
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run
from headwater.dashboard.running.scores import STATISTICS
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.state import State
from headwater.dashboard.tables import per_token, table
from headwater.dashboard.widgets import chart, numbers, plain
from headwater.lens.errors import HeadwaterError

VIEWS = {"map": "map of the head", "answers": "answers", "heads": "heads", "sinks": "sinks"}
NAMED = 6  # tokens that are named in a line
SCORES = {"sink": "Attention to the first token", **{name: each[0] for name, each in STATISTICS.items()}}


def draw_told(one: Run, other: Run, chosen: Measure, places: Aligned) -> None:
    """The measure of both, and what does not belong together."""
    values = [] if chosen.kind == "none" else [chosen.value(run) for run in (one, other)]
    with st.container(horizontal=True):
        for name, value in zip("AB", values, strict=False):
            st.metric(
                f"{name}: {plain(chosen.label)}", "none" if value is None else f"{value:.4g} {chosen.unit}"
            )
        if values and None not in values:
            st.metric("B − A", f"{values[1] - values[0]:+.4g} {chosen.unit}")  # type: ignore[operator]
    if told := compare.shapes(one, other):
        st.info(plain(told + "."))
    for side, run, name in ((0, one, "A"), (1, other, "B")):
        if only := places.only(side):
            st.caption(plain(f"Only in {name}: {_named(run, only)}"))
    if one.keys != other.keys:
        numbers("tokens-a-b", compare.table(one, other, places), "compare-tokens")


def _named(run: Run, positions: list[int]) -> str:
    words = [f"{n} ‹{cut(visible(run.keys[n]), 16)}›" for n in positions[:NAMED]]
    return ", ".join(words) + (f" and {len(positions) - NAMED} more" if len(positions) > NAMED else "")


def choose(state: State) -> tuple[str, bool]:
    """The view, and whether B stands at the left."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        view = bound.segments(
            state, "compare.view", "Compare", list(VIEWS), show=VIEWS.__getitem__, width="content"
        )
        return view, bound.toggle(state, "compare.swapped", "B at the left")


def draw(state: State, view: str, sides: list[tuple[str, Run]], places: Aligned) -> None:
    score = None
    if view == "heads":
        score = bound.choice(state, "compare.score", "Score", list(SCORES), "sink", show=SCORES.__getitem__)
    for column, (name, run) in zip(st.columns(2, gap="medium"), sides, strict=True):
        with column:
            try:
                _draw_one(state, view, name, run, places, score, [each for _, each in sides])
            except (HeadwaterError, KeyError) as error:
                st.info(plain(f"Run {name} has none: {error}"))


def _draw_one(
    state: State, view: str, name: str, run: Run, places: Aligned, score: str | None, both: list[Run]
) -> None:
    if view == "map":
        _map(state, name, run, places)
    elif view == "answers":
        st.subheader(f"Run {name}")
        if not run.logits.size:
            st.info(plain(f"{run.name} predicts no token and no class."))
            return
        st.dataframe(
            compare.answers(run),
            hide_index=True,
            key=f"compare-answers-{name}",
            alt=f"Likeliest answers of run {name}",
        )
    elif view == "heads" and score is not None:
        found = [scores.of_record(score, each) for each in both]
        ends = [
            float(np.nanmin([each.min() for each in found])),
            float(np.nanmax([each.max() for each in found])),
        ]
        values, title = scores.of_record(score, run), f"{SCORES[score]}: {name}"
        limits, chosen = (min(ends[0], 0.0), ends[1]), (state.layer, state.head)
        key = f"compare-heads-{name}"
        grid(
            values, key=key, title=title, limits=limits, chosen=chosen, on_event=lambda event: _choose(event, both),
        )  # fmt: skip
        page = lambda: head_grid(values, title, "", limits, chosen)  # noqa: E731
        numbers(f"score-per-head-{name}", table(values, "score"), f"{key}-numbers", page)
    else:
        share = sinks.shares(run).overall()
        best = int(np.nanargmax(share))
        figure = token_bars(share, run.keys, f"Share received: {name}", "share")
        chart(figure, f"compare-sinks-{name}", f"Run {name}: most goes to token {best}, {share[best]:.3f}")
        frame = per_token(share, run.keys, "share")
        numbers(f"share-received-{name}", frame, f"compare-sinks-{name}-numbers", figure)


def _choose(event: dict[str, Any], both: list[Run]) -> None:
    if "head" in event:
        layer, head = event["head"]
        if all(layer in run.layers and head < run.n_heads for run in both):
            session.current().choose_head(int(layer), int(head))
            session.touch()


def _map(state: State, name: str, run: Run, places: Aligned) -> None:
    """The map of the chosen head; the chosen pair is the same on both sides, where both have its tokens."""
    if state.layer not in run.layers or state.head >= run.n_heads:
        st.info(plain(f"Run {name} ({run.name}) has no head {state.layer}.{state.head}."))
        return
    there: Callable[[int | None], int | None] = places.to_b if name == "B" else lambda place: place
    query, key = there(state.query), there(state.key)
    fits = query is not None and key is not None and query < len(run.queries) and key < len(run.keys)
    where = (slice(0, len(run.queries)), slice(0, len(run.keys)))
    weights = attention.weights_of(run, state.layer, state.head, where)
    received, entropy = attention.margins(run, state.layer, state.head)
    pair = (query, key) if fits else None
    attention_map(
        weights, run.queries, run.keys, key=f"compare-map-{name}", title=f"Head {state.layer}.{state.head}: {name}",
        chosen=pair, causal=run.causal, received=received, entropy=entropy,  # type: ignore[arg-type]
        on_event=lambda event: _take(event, name, run, places),
    )  # fmt: skip
    if isinstance(weights, np.ndarray):
        title = f"Head {state.layer}.{state.head}: {name}"
        attention.offer(run, weights, where, f"compare-map-{name}", title, f"attention-{name}")
    if pair is not None and isinstance(weights, np.ndarray):
        st.caption(
            plain(
                f"{name}: {pair[0]} ‹{cut(visible(run.queries[pair[0]]), 16)}› → {pair[1]} "  # type: ignore[index]
                f"‹{cut(visible(run.keys[pair[1]]), 16)}› {weights[pair]:.4f}"  # type: ignore[index]
            )
        )
    elif state.query is not None and state.key is not None:
        st.caption(f"Run {name} lacks a token of the chosen pair.")


def _take(event: dict[str, Any], name: str, run: Run, places: Aligned) -> None:
    """A click on either side, as positions of run A."""
    here: Callable[[int], int | None] = places.to_a if name == "B" else lambda place: place
    if "cell" in event:
        query, key = (here(int(place)) for place in event["cell"])
        if query is not None and key is not None:
            state = session.current()
            state.query, state.key = query, key
            session.touch()
    elif "token" in event:
        place = here(int(event["token"]))
        if place is not None:
            session.current().put("key" if event.get("side") == "key" else "query", place)
            session.touch()
    elif "walk" in event:
        attention.take(event, run.layers, run.n_heads)
