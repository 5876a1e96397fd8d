"""What edits did: the measure, the answers, the loss of each token, the heads whose attention moved, the text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import streamlit as st

import headwater as hw
from headwater.dashboard import pages
from headwater.dashboard.canvas.attention_map import attention_map
from headwater.dashboard.charts.changes import dumbbells, loss_changes
from headwater.dashboard.charts.chips import signed_chips
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.labels import cut, readable, visible
from headwater.dashboard.parts import attention
from headwater.dashboard.parts.job import wait
from headwater.dashboard.running import changes, runs
from headwater.dashboard.running.measure import Measure, quoted
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, clicked, numbers, plain

DeltaColor = Literal["normal", "inverse"]
Row = tuple[str, float | None, float | None, str, DeltaColor]
AXES = {"p": "probability", "log p": "log-probability, nats"}
MOST_MAP = 512  # tokens a side of the maps that are compared here
MOST_CHIPS = 600  # tokens that are shown one by one
LEAST_CHANGE = 0.01  # nats; smaller changes fill no colour
FEW_TOKENS = 512  # above it, the attention that moved is a job


def draw_numbers(measure: Measure, one: Run, other: Run) -> None:
    """The measure, how far the answers are apart, and the loss; the measure first."""
    a, b = measure.value(one), measure.value(other)
    colour: DeltaColor = "normal" if measure.better > 0 else "inverse"
    found: list[Row] = [(measure.label, a, b, measure.unit, colour)]
    if measure.kind == "difference":
        alone = replace(measure, kind="log_probability", wrong=None)
        name = f"log p({quoted(one.label(measure.answer or 0))})"
        found.append((name, alone.value(one), alone.value(other), "nats", "normal"))
    if measure.kind != "loss" and one.loss is not None and other.loss is not None:
        found.append(("mean loss of the text's tokens", one.loss, other.loss, "nats", "inverse"))
    apart = changes.divergence(one, other)
    columns = [column for _ in range(2) for column in st.columns(2)]
    for (label, before, after, unit, colour), column in zip(found, columns, strict=False):
        if before is None or after is None:
            column.metric(plain(label), "no value")
            continue
        change = f"{after - before:+.4g}{f' {unit}' if unit else ''}, A {before:.4g}"
        column.metric(
            plain(label), f"{after:.4g}", change, delta_color=colour, help="of run B; below, the change"
        )
    if apart is not None:
        what = "classes" if one.labels else "next tokens"
        columns[len(found)].metric(
            "KL(A‖B), nats", f"{apart:.3g}", help=f"of the {what}; 0 where the edits change no probability"
        )


def draw_answers(state: State, one: Run, other: Run) -> None:
    """The likeliest answers of both runs as dumbbells, on an axis that fits them."""
    if not one.logits.size or one.logits.shape != other.logits.shape:
        return
    table = changes.answers(one, other)
    axis = bound.segments(state, "edit.axis", "Axis", list(AXES), "p", show=AXES.__getitem__)
    title = "Likeliest classes" if one.labels else "Likeliest next tokens"
    figure = dumbbells(
        list(table["answer"]), table[f"{axis} A"].to_numpy(), table[f"{axis} B"].to_numpy(), AXES[axis], title
    )
    seen = [
        f"{visible(str(row['answer']))} {row[f'{axis} A']:.4g} to {row[f'{axis} B']:.4g}"
        for row in table.head(5).to_dict("records")
    ]
    chart(figure, "edit-answers", f"{title}, {AXES[axis]} in A and B: {'; '.join(seen)}")
    numbers("answers-a-b", table, "edit-answers", figure)


def draw_losses(state: State, one: Run, other: Run) -> None:
    """The text with the change of each token's loss."""
    if one.loss is None or other.loss is None or one.queries != other.queries:
        return
    a, b = changes.token_losses(one), changes.token_losses(other)
    if a is None or b is None or len(a) != len(one.queries):
        return
    title = "Change of each token's loss"
    change = b - a
    frame = pd.DataFrame(
        {"position": range(len(a)), "token": one.queries, "loss A": a, "loss B": b, "change": change}
    )
    order = [
        int(n)
        for n in np.argsort(-np.abs(np.nan_to_num(change)), kind="stable")[:5]
        if np.isfinite(change[n])
    ]
    seen = ", ".join(f"{n} {visible(one.queries[n])} {change[n]:+.3g}" for n in order)
    reach = max(LEAST_CHANGE, float(np.nanmax(np.abs(change), initial=0.0)))
    figure = loss_changes(a, b, one.queries, title)
    if len(a) > MOST_CHIPS:
        chart(figure, "edit-losses", f"{title}, largest: {seen} nats")
    else:
        st.markdown(f"**{title}**")
        said = [
            "no loss" if np.isnan(each) else f"A {a[n]:.4g}, B {b[n]:.4g}, change {each:+.4g} nats"
            for n, each in enumerate(change)
        ]
        st.html(signed_chips(change, one.queries, reach, said))
        st.caption(plain(f"Red rose, blue fell, full at ±{reach:.3g} nats. Largest: {seen}."))
    if one.position is not None:
        st.caption("What the last token predicts is not in the text: that change stands above.")
    numbers("loss-per-token", frame, "edit-losses", figure)


def draw_heads(state: State, one: Run, other: Run) -> None:
    """Which heads' attention moved; the chosen one's maps, at first those of the head that moved most."""
    if not changes.comparable(one, other):
        st.caption(
            "The maps of A and B are of different tokens or heads, and are not compared here: see Compare."
        )
        return
    key = ("moved", one.identity, other.identity)
    patience = 60.0 if len(one.queries) <= FEW_TOKENS else None
    moves = wait(
        key, partial(changes.moved, one, other), "attention that moved", model=one.name, patience=patience,
        lane="light",
    )  # fmt: skip
    if moves is None:
        return
    layer, head = _head(state, one, moves)
    left, right = st.columns([2, 3], gap="large")
    with left:
        most = changes.most_moved(moves)
        largest = float(moves.max())
        title = "Which heads' attention moved"
        said = "½ Σ|ΔA| of a row, mean over rows"
        figure = head_grid(moves, title, "share moved", chosen=(layer, head), subtitle=said)
        order = moves.to_series().nlargest(5)
        seen = ", ".join(f"{at[0]}.{at[1]} {value:.3g}" for at, value in zip(order.index, order, strict=True))
        point = clicked(figure, "edit-moved", f"{title}, largest: {seen}")
        if point is not None:
            state.put("edit.head", f"{point['y']}.{point['x']}")
            session.again()
        if largest <= changes.UNCHANGED:
            st.caption("No head's attention moved by more than 1e-6.")
        else:
            st.caption(
                f"Most: {most[0]}.{most[1]} ({largest:.3g}). An edit of a head's output moves no weight of its own "
                "map: it shows in later layers and in the answer."
            )
        st.page_link(
            pages.page("head"), label=f"Open head {layer}.{head}", icon=":material/center_focus_strong:",
            query_params=_address_of(state, layer, head),
        )  # fmt: skip
        numbers(
            "attention-moved", moves.to_series().rename("share moved").reset_index(), "edit-moved", figure
        )
    with right:
        _maps(state, one, other, layer, head)


def _head(state: State, run: Run, moves) -> tuple[int, int]:
    """The head to show: the one clicked, else the one that moved most."""
    given = str(state.get("edit.head", ""))
    if given:
        try:
            found = hw.Head.parse(given)
            if found.layer in run.layers and 0 <= found.head < run.n_heads:
                return found.layer, found.head
        except hw.HeadwaterError:
            pass
        state.settings.pop("edit.head")
    return changes.most_moved(moves)


def _address_of(state: State, layer: int, head: int) -> dict[str, str]:
    return {**to_address(state), "layer": str(layer), "head": str(head)}


def _maps(state: State, one: Run, other: Run, layer: int, head: int) -> None:
    """The chosen head's map in A and B, and the difference."""
    last = min(MOST_MAP, len(one.queries)), min(MOST_MAP, len(one.keys))
    if max(len(one.queries), len(one.keys)) > MOST_MAP:
        st.caption(f"The first {MOST_MAP} tokens; the page Head shows any window.")
    window = slice(0, last[0]), slice(0, last[1])
    maps = [runs.pattern(run, layer, head, *window) for run in (one, other)]
    tokens = one.queries[: last[0]], one.keys[: last[1]]
    shows = bound.segments(
        state, "edit.map", "Map", ["change", "a", "b"], "change",
        show={"change": "B − A", "a": "A", "b": "B"}.__getitem__, label_visibility="collapsed",
    )  # fmt: skip
    title = f"Head {layer}.{head}"
    if shows == "change":
        attention_map(
            maps[1] - maps[0], *tokens, key="edit-map-change", title=f"{title}, B − A", causal=one.causal,
            signed=True, unit="change", scale="linear",
        )  # fmt: skip
        attention.offer(
            one, maps[1] - maps[0], window, "edit-map-change", f"{title}, B − A", "attention-change"
        )
    else:
        at = ["a", "b"].index(shows)
        attention_map(
            maps[at], *tokens, key=f"edit-map-{shows}", title=f"{title}, {shows.upper()}", causal=one.causal
        )
        attention.offer(one, maps[at], window, f"edit-map-{shows}", f"{title}, {shows.upper()}")


def draw_text(state: State, model: hw.HookedModel, one: Run, other: Run) -> None:
    """What the model writes on in A and in B, with the differences marked."""
    if not (model.has_lm_head and model.causal):
        return
    st.subheader("What it writes")
    count = bound.number(state, "edit.new_tokens", "New tokens", 1, 200, 20, 1)
    if not bound.toggle(state, "edit.write", "Write on from the text, with and without the edits"):
        return
    key = ("written", one.identity, other.identity, count)

    def work() -> tuple[str, str]:
        return (
            changes.continued(one, count),
            changes.continued(other, count),
        )

    found = wait(key, work, "continued text", model=one.name)
    if found is None:
        return
    for name, pieces in zip("AB", changes.differing(*found), strict=True):
        marked = "".join(
            f":orange-background[{plain(visible_text(text))}]" if differs else plain(visible_text(text))
            for text, differs in pieces
        )
        st.markdown(f"**{name}** {marked or '∅'}")
    st.caption(
        "Both write the same." if found[0] == found[1] else "Marked: words that only this run writes. Greedy."
    )


def visible_text(text: str) -> str:
    """A written text with line ends and unseen marks made visible."""
    return cut(readable(text), 4000)
