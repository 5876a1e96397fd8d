"""What the page Sinks shows: where attention drains, by which rules, what is carried there, and the edit against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard import pages, tables
from headwater.dashboard.charts import sinks as figures
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.parts.job import fitting
from headwater.dashboard.parts.token_choice import MOST_LISTED
from headwater.dashboard.running import runs, sinks
from headwater.dashboard.running.runs import Run
from headwater.dashboard.running.sinks import HOW, RULES, Shares
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, clicked, numbers, plain, quoted, token_name

MOST_TOKENS = 200  # of the map; of longer inputs those that receive most


def choose(state: State, run: Run, found: Shares) -> tuple[list[int], float, int]:
    """The tokens taken as sinks, the limit of a sink, and how many queries must see a token."""
    rate = entry("sink_rate").setting("threshold")
    with st.container(horizontal=True, vertical_alignment="bottom", key="sinks-settings"):
        limit = bound.slider(
            state, "sinks.limit", "A sink receives more than", 0.0, 1.0, float(rate.default), 0.05
        )
        least = bound.number(
            state, "sinks.least", "Seen by at least", 1, max(len(run.queries), sinks.LEAST), sinks.LEAST, 1,
            help="queries; the share of a token that fewer see rests on few weights",
        )  # fmt: skip
        first = sinks.first_keys(found, limit, least)
        keys = bound.several(
            state, "sinks.keys", "Taken as the sink", _offered(state, run, found, first), first,
            show=lambda place: token_name(run.keys, place), help="a click on a token in the map takes it",
        )  # fmt: skip
    return keys or first, limit, least


def _offered(state: State, run: Run, found: Shares, first: Sequence[int]) -> list[int]:
    """Positions to choose from: all, or of a long input those that receive most and those that are chosen."""
    count = len(run.keys)
    if count <= MOST_LISTED:
        return list(range(count))
    most = np.argsort(-np.nan_to_num(found.overall()), kind="stable")[:MOST_TOKENS].tolist()
    chosen = [each for each in state.listed("sinks.keys") if type(each) is int and 0 <= each < count]
    return sorted({*most, *first, *chosen})


def draw_map(
    state: State, run: Run, found: Shares, other: Shares | None, keys: Sequence[int], limit: float, least: int
) -> None:
    """Layers × positions; with `other`, the change from this run to that one."""
    how = bound.segments(state, "sinks.how", "Share by layer", list(HOW), "mean", show=HOW.__getitem__)
    values, few = found.by_layer(how, limit), found.few(least)
    if other is not None:
        values, few = other.by_layer(how, limit) - values, few | other.few(least)
    shown = np.where(few, np.nan, values)
    order = np.argsort(-np.nan_to_num(np.abs(shown)).max(axis=0), kind="stable")
    places = sorted({*order[:MOST_TOKENS].tolist(), *keys})
    unit = "fraction of heads" if how == "heads" else "share"
    name = "change of the share, B − A" if other is not None else "share that each token receives"
    hatched = int(few.any(axis=0).sum())
    figure = figures.share_map(
        values, few, run.keys, places, run.layers, escaped(f"{name[:1].upper()}{name[1:]}, {HOW[how]}"), unit,
        subtitle="click a token to take it as the sink", chosen=keys,
    )  # fmt: skip
    seen = np.where(np.isfinite(shown), np.abs(shown), -1)
    top = np.argsort(-seen, axis=None, kind="stable")[:4]
    told = ", ".join(
        f"layer {run.layers[y]} {quoted(run.keys[x])} {shown[y, x]:.2f}"
        for y, x in (np.unravel_index(n, shown.shape) for n in top)
        if np.isfinite(shown[y, x])
    )
    point = clicked(figure, "sink-map", f"Largest: {told}")
    enough = found.enough(least)
    lines = [
        f"Hatched: {hatched} tokens that fewer than {enough} queries see; their share rests on few weights."
    ]
    if len(places) < len(run.keys):
        lines.append(f"The {len(places)} tokens that receive most, of {len(run.keys)}.")
    if hatched or len(lines) > 1:
        st.caption(plain(" ".join(lines if hatched else lines[1:])))
    if point is not None and "customdata" in point:
        place = int(point["customdata"])
        new = [key for key in keys if key != place] if place in keys else [place]
        state.put("sinks.keys", new or [place])
        session.again()
    frame = pd.DataFrame(
        [(layer, place, run.keys[place], values[i, place], bool(few[i, place]))
         for i, layer in enumerate(run.layers) for place in range(len(run.keys))],
        columns=["layer", "position", "token", unit, "seen by few"],
    )  # fmt: skip
    numbers("received-share", frame, "sink-map-numbers", figure)


def draw_heads(
    state: State, run: Run, found: Shares, other: Shares | None, keys: Sequence[int], limit: float
) -> None:
    """How much of each head drains on the sink, and the edit of exactly those above the limit."""
    share = found.of_heads(keys)
    heads = sinks.above(found, keys, limit)
    named = ", ".join(quoted(run.keys[key]) for key in keys[:4])
    left, right = st.columns([3, 1], vertical_alignment="center")
    with right:
        known = int(np.isfinite(share.values).sum())
        st.metric(
            "Sink rate",
            f"{len(heads) / max(known, 1):.1%}",
            help="heads that give the sink more than the limit",
        )
        _redistribute(state, run, keys, heads, named)
    with left:
        drawn, title = share, f"Share that each head gives to {named}"
        if other is not None:
            drawn = other.of_heads(keys) - share
            title = f"Change of the share of {named}, B − A"
        figure = head_grid(
            drawn,
            escaped(title),
            "share",
            None if other is not None else (0.0, 1.0),
            (state.layer, state.head),
        )
        order = np.argsort(-np.abs(np.nan_to_num(drawn.values)), axis=None, kind="stable")[:4]
        told = ", ".join(
            f"{run.layers[i]}.{j} {drawn.values[i, j]:.2f}"
            for i, j in (np.unravel_index(n, drawn.shape) for n in order)
        )
        point = clicked(figure, "sink-heads", f"Largest: {told}")
    st.caption("Share: mean weight over the tokens that can see it. Click a head to open it.")
    numbers("sink-heads", tables.table(drawn, "share"), "sink-heads-numbers", figure)
    if point is not None:
        _open(state, int(point["y"]), int(point["x"]))


def _redistribute(state: State, run: Run, keys: Sequence[int], heads: list[str], named: str) -> None:
    """One button: run B gives most of what these heads put on the sink to other tokens."""
    fits = run.name == state.model and not run.of_record
    if st.button(
        "Redistribute this", key="redistribute", type="primary", disabled=not heads or not fits,
        icon=":material/alt_route:", width="stretch",
    ):  # fmt: skip
        state.edits.append(state.on_part(sinks.redistribution(keys, heads)))
        state.shown = "b"
        st.switch_page(pages.page("edit"), query_params=to_address(state))
    if not fits:
        st.caption("A record can not be edited." if run.of_record else "Edits are of the model of run A.")
    elif heads:
        told = f"run B: {1 - sinks.KEEP:.0%} of what {len(heads)} heads give to {named} goes to other tokens"
        st.caption(plain(told))
    else:
        st.caption("No head is above the limit.")


def _open(state: State, layer: int, head: int) -> None:
    state.choose_head(layer, head)
    st.switch_page(pages.page("head"), query_params=to_address(state))


def draw_recorded(
    state: State, run: Run, found: Shares, keys: Sequence[int], limit: float, least: int
) -> None:
    """Rules side by side, and heads by share and value."""
    least = found.enough(least)
    key = ("sinks", run.identity, tuple(keys), limit, least)
    work = lambda: sinks.recorded(state, run, keys, limit, least)  # noqa: E731
    told = fitting(key, work, "rules and norms of the sinks", model=run.name)
    if told is None:
        return
    st.subheader("By which rules")
    _rules(run, told.rules, least)
    if told.norms is not None:
        st.subheader("Long or short values")
        _norms(state, run, found, told.norms, keys, limit)
    if told.told:
        st.caption(plain("Not here: " + "; ".join(told.told)))


def _rules(run: Run, found: pd.DataFrame, least: int) -> None:
    kept = found[(found > 0).any(axis=1)]
    if not len(kept):
        st.caption("By no rule is a token a sink.")
        return
    kept = kept.iloc[np.argsort(-kept.max(axis=1).to_numpy(), kind="stable")]
    names = [token_name(run.keys, place) for place in kept.index]
    st.dataframe(
        kept.head(200).rename(columns=RULES).assign(token=names[:200]).set_index("token"), key="sink-rules",
        alt=f"Fraction of heads by rule: {names[0]} {kept.iloc[0].max():.0%} and {len(kept) - 1} more tokens",
        column_config={
            name: st.column_config.ProgressColumn(name, format="percent", min_value=0, max_value=1)
            for name in RULES.values()
        },
    )  # fmt: skip
    st.caption(
        "Fraction of heads for which a token is a sink; of massive activations, of layers. Empty: no score."
    )
    st.caption(plain(f"Not for: {entry('find_sinks').not_for}."))


def _norms(state: State, run: Run, found: Shares, norms: Any, keys: Sequence[int], limit: float) -> None:
    value = norms["value"].isel(batch=0)
    ratio = (value.sel(of="sinks") / value.sel(of="others")).values
    share = found.of_heads(keys)
    figure = figures.share_and_norm(
        share, ratio, limit, "Share and value of the sink", "a point per head; below 1 its value is shorter"
    )
    over = ratio[(np.nan_to_num(share.values) > limit) & np.isfinite(ratio)]
    told = (
        f"above the limit the median value is {np.median(over):.2f} × the others'"
        if over.size
        else "none above"
    )
    point = clicked(figure, "sink-norms", f"{share.size} heads; {told}")
    st.caption(
        plain(
            f"{told[:1].upper()}{told[1:]}. Click a head to open it. Not for: {entry('sink_norms').not_for}."
        )
    )
    frame = tables.table(share, "share").assign(value_ratio=ratio.ravel()[np.isfinite(share.values.ravel())])
    numbers("share-and-value", frame, "sink-norms-numbers", figure)
    if point is not None and "customdata" in point:
        layer, head = point["customdata"]
        _open(state, int(layer), int(head))


def draw_contribution(state: State, run: Run, keys: Sequence[int]) -> None:
    st.subheader("What it carries")
    key = ("carries", run.identity, tuple(keys))
    found = fitting(
        key, lambda: sinks.contribution(state, run, keys), "what the sink carries", model=run.name
    )
    if found is None:
        return
    share = found["share"].sel(of="sinks").isel(batch=0)
    left, right = st.columns([3, 2], gap="large")
    with left:
        figure = head_grid(
            share, "Part of each head's output that comes from the sink", "share", (0.0, 1.0),
            (state.layer, state.head),
        )  # fmt: skip
        order = np.argsort(-np.nan_to_num(share.values), axis=None, kind="stable")[:4]
        told = ", ".join(
            f"{run.layers[i]}.{j} {share.values[i, j]:.2f}"
            for i, j in (np.unravel_index(n, share.shape) for n in order)
            if np.isfinite(share.values[i, j])
        )
        point = clicked(figure, "sink-carries", f"Largest: {told}")
        if point is not None:
            _open(state, int(point["y"]), int(point["x"]))
    with right:
        frame = pd.DataFrame(
            {
                "without the value of": ["the sink", "as many other tokens"],
                **{
                    str(name).replace("_", " "): found[str(name)].isel(batch=0).values
                    for name in found["measure"].values
                },
            }
        )
        st.dataframe(frame, hide_index=True, key="sink-carries-table", alt="Change of the prediction")
        st.caption("How far the output moves when the values there are set to zero in all heads at once.")
        st.caption(plain(f"Not for: {entry('sink_contribution').not_for}."))
    numbers(
        "what-the-sink-carries",
        tables.table(found["share"].isel(batch=0), "share"),
        "sink-carries-numbers",
        figure,
    )


def draw_generated(state: State, run: Run, keys: Sequence[int]) -> None:
    model = runs.model_of(state, run)
    if not sinks.can_generate(run, model):
        return
    st.subheader("While text is generated")
    steps = bound.slider(state, "sinks.steps", "New tokens", 4, 64, 16)
    key = ("generated", run.identity, tuple(keys), steps)
    found = fitting(
        key, lambda: sinks.generated(state, run, keys, steps), "the sink over generated text", model=run.name
    )
    if found is None:
        return
    mean = found.mass.mean("layer").values
    figure = figures.over_steps(
        found.mass, found.tokens, found.first, "Weight that each token puts on the sink"
    )
    parts = mean[: found.first], mean[found.first :]
    before, after = (
        tables.said(part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan) for part in parts
    )
    told = f"over the prompt {before}, over new tokens {after}"
    chart(figure, "sink-steps", f"Mean weight: {told}")
    st.caption(
        plain(
            f"Mean of heads and layers: {told}. {len(found.tokens) - found.first} new tokens, right of the line."
        )
    )
    numbers("sink-over-steps", tables.table(found.mass, "weight"), "sink-steps-numbers", figure)


def draw_family(state: State) -> None:
    """Models that differ in the rule of their attention alone, on one prompt."""
    if not sinks.family():
        return
    st.subheader("Would another rule of attention do without?")
    if not bound.toggle(
        state, "sinks.family", f"Compare {len(sinks.family())} small models that differ in that rule"
    ):
        return
    text = bound.text(state, "sinks.text", "Text for the small sink models", sinks.family_text(state.text))
    limit = state.get("sinks.limit", 0.3)
    limit = limit if isinstance(limit, float) else 0.3
    text = text or sinks.FAMILY_TEXT
    work = lambda: sinks.compared(text, limit)  # noqa: E731
    found = fitting(("family", text, limit), work, "the sink models", model=sinks.family()[0])
    if found is None:
        return
    rates = zip(found["model"], found["sink rate"], strict=True)
    st.dataframe(
        found, hide_index=True, key="sink-family",
        alt=f"Sink rate by model: {', '.join(f'{name} {rate:.0%}' for name, rate in rates)}",
        column_config={
            **{name: st.column_config.ProgressColumn(name, format="percent", min_value=0, max_value=1)
               for name in ("sink rate", "of unit rows")},
            **{name: st.column_config.NumberColumn(format="%.3f")
               for name in ("mean share", "largest share", "row sum", "loss")},
        },
    )  # fmt: skip
    st.caption(
        "Two layers of four heads, trained alike on texts of 60 words. The first token; of unit rows: with each row "
        "divided by its sum, where rows do not sum to 1."
    )
