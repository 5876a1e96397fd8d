"""The attention of one head as a map that can be clicked: of one run, or of A, B and their difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st
import xarray as xr

import headwater as hw
from headwater.analyses.sinks._received_share import received_share
from headwater.dashboard import tables
from headwater.dashboard.canvas.attention_map import attention_map
from headwater.dashboard.figures.pooling import MOST_CELLS, Pooled, pool_blocks
from headwater.dashboard.running import compare, runs
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import session
from headwater.dashboard.state.kept import Kept
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import numbers
from headwater.lens.errors import HeadwaterError

Window = tuple[slice, slice]
WINDOW = "head.window"
_pooled = Kept(2**26)  # the maps of long texts, by run, head and window


def window(state: State, run: Run) -> Window:
    """The queries and keys that are shown: those of the state, where they lie inside the input; else all."""
    sides = (len(run.queries), len(run.keys))
    given = state.listed(WINDOW)
    if len(given) == 4 and all(isinstance(each, int) for each in given):
        q0, q1, k0, k1 = given
        if 0 <= q0 < q1 <= sides[0] and 0 <= k0 < k1 <= sides[1]:
            return slice(q0, q1), slice(k0, k1)
    return slice(0, sides[0]), slice(0, sides[1])


def weights_of(run: Run, layer: int, head: int, where: Window) -> np.ndarray | Pooled:
    """Exact weights [query, key] of a window, or the largest of each block where it is too large to draw."""
    queries, keys = where
    shape = (queries.stop - queries.start, keys.stop - keys.start)
    if max(shape) <= MOST_CELLS:
        return runs.pattern(run, layer, head, queries, keys)
    key = (run.identity, layer, head, queries.start, queries.stop, keys.start, keys.stop)
    found = _pooled.get(key)
    if found is None:
        found = pool_blocks(runs.rows(run, layer, head, queries, keys), shape)
        _pooled.put(key, found)
    return found


def margins(run: Run, layer: int, head: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Exact and over the whole input: the share that each key receives, the entropy of each query in nats."""
    found: list[np.ndarray | None] = []
    for made in (lambda: received_share(run.record), lambda: run.record.statistic("entropy")):
        try:
            values = made().isel(batch=0).sel(layer=layer).isel(head=head).values
        except (KeyError, HeadwaterError):  # a record without that statistic
            values = None
        found.append(values)
    return found[0], found[1]


def draw_head(state: State, run: Run, key: str, layer: int, head: int, title: str = "") -> None:
    """One map with its margins and its numbers."""
    where = window(state, run)
    queries, keys = where
    received, entropy = margins(run, layer, head)
    weights = weights_of(run, layer, head, where)
    attention_map(
        weights, run.queries[queries], run.keys[keys], key=key, title=title or f"Head {layer}.{head}",
        chosen=chosen(state, where), first=(queries.start, keys.start), causal=run.causal,
        received=None if received is None else received[keys], entropy=None if entropy is None else entropy[queries],
        windowed=state.get(WINDOW) is not None, on_event=lambda event: take(event, run.layers, run.n_heads),
    )  # fmt: skip
    if isinstance(weights, np.ndarray):
        frame = pairs(run, weights, where)
        page = lambda: hw.figure(run.record, title=title or None, layer=layer, head=head)  # noqa: E731
        numbers(f"attention-{layer}.{head}", frame, f"{key}-numbers", page)


def offer(
    run: Run, weights: np.ndarray, where: Window, key: str, title: str, name: str = "attention"
) -> None:
    """The numbers of a map, or of the difference of two, to read and to take away, with a page of their figure."""

    def page() -> Any:
        sides = ((run.queries, where[0]), (run.keys, where[1]))
        words = [np.asarray(tokens[place], dtype=object) for tokens, place in sides]
        coords: dict[str, Any] = {"query_token": ("query", words[0]), "key_token": ("key", words[1])}
        coords |= {
            "query": np.arange(where[0].start, where[0].stop),
            "key": np.arange(where[1].start, where[1].stop),
        }
        return hw.figure(xr.DataArray(weights, dims=("query", "key"), coords=coords), title=title)

    numbers(name, pairs(run, weights, where), f"{key}-numbers", page)


def draw_difference(state: State, one: Run, other: Run, key: str, layer: int, head: int) -> None:
    """B minus A on A's tokens, on a scale of at least ±0.01; what B lacks of them is left out and named."""
    where = window(state, one)
    queries, keys = where
    shape = (queries.stop - queries.start, keys.stop - keys.start)
    if max(shape) > MOST_CELLS:
        st.caption(
            f"Changes are drawn for windows of at most {MOST_CELLS} tokens: drag over a part of a map."
        )
        return
    change = compare.change_of_map(one, other, layer, head, where, 4 * MOST_CELLS)
    if change is None:
        st.caption(
            "The tokens of this window stand too far apart in run B: drag over a smaller part of a map."
        )
        return
    attention_map(
        change, one.queries[queries], one.keys[keys], key=key, title=f"Head {layer}.{head}: B − A", signed=True,
        chosen=chosen(state, where), first=(queries.start, keys.start), causal=one.causal, unit="change",
        windowed=state.get(WINDOW) is not None, on_event=lambda event: take(event, one.layers, one.n_heads),
    )  # fmt: skip
    offer(one, change, where, key, f"Head {layer}.{head}: B − A", f"attention-{layer}.{head}-change")


def chosen(state: State, where: Window) -> tuple[int, int] | None:
    """The chosen pair, where it is in the window."""
    if state.query is None or state.key is None:
        return None
    inside = where[0].start <= state.query < where[0].stop and where[1].start <= state.key < where[1].stop
    return (state.query, state.key) if inside else None


def take(event: dict[str, Any], layers: list[int], n_heads: int) -> None:
    """What was done at a map, into the state."""
    state = session.current()
    session.touch()
    if "cell" in event:
        state.query, state.key = event["cell"]
    elif "token" in event:
        state.put("key" if event.get("side") == "key" else "query", int(event["token"]))
    elif "window" in event:
        if event["window"] is None:
            state.settings.pop(WINDOW, None)
        else:
            state.put(WINDOW, [int(each) for each in event["window"]])
    elif "walk" in event:
        down, right = event["walk"]
        place = min(max(layers.index(state.layer) + down, 0), len(layers) - 1)
        state.choose_head(layers[place], min(max(state.head + right, 0), n_heads - 1))


def pairs(run: Run, weights: np.ndarray, where: Window) -> Any:
    """The numbers behind a map; pairs that a mask leaves out are not among them."""
    frame = tables.pairs(weights, run.queries[where[0]], run.keys[where[1]], where[0].start, where[1].start)
    frame = frame[frame["weight"].notna()]
    return frame[frame["key"] <= frame["query"]] if run.causal else frame
