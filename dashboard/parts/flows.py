"""What the page Flow shows: rows of methods, how far they can be believed, and the paths of a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

import headwater as hw
from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard import pages, tables
from headwater.dashboard.charts import flow as figures
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.names import grid_of
from headwater.dashboard.parts import records
from headwater.dashboard.parts.job import fitting, wait
from headwater.dashboard.parts.token_choice import choose_token
from headwater.dashboard.running import flows, picture
from headwater.dashboard.running.flows import METHODS, Row
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, clicked, numbers, plain, quoted

MOST_TOKENS = 100  # of a strip; of longer inputs those with the most weight
# on a phone the strips are wider than the page, and scroll
STYLE = ".st-key-flow-strips{overflow-x:auto}.st-key-flow-strips>*{min-width:660px}"
FACES = {"deletion": "remove the largest first", "insertion": "keep the largest alone"}
Rows = dict[str, Row]


def choose(state: State, run: Run) -> tuple[int, list[str], dict[str, Any]]:
    """The token, the methods and the settings of rollout and flow."""
    first = flows.query_at_first(run)
    query = first if state.query is None else min(state.query, len(run.queries) - 1)
    token, which = st.columns([1, 3], vertical_alignment="bottom")
    with token:
        choose_token(state, "query", "Token", run.queries, query)
    with which:
        methods = bound.several(
            state,
            "flow.methods",
            "Methods",
            flows.methods_of(run),
            flows.methods_at_first(run),
            show=METHODS.__getitem__,
        )
    with st.container(horizontal=True, vertical_alignment="bottom", key="flow-settings"):
        heads = bound.segments(
            state, "flow.heads", "Heads of a layer, in rollout and flow", ["mean", "max", "min"]
        )
        adds = bound.toggle(state, "flow.add_residual", "Residual stream", True)
        weight = bound.slider(
            state, "flow.residual", "Weight of the residual stream", 0.0, 1.0, 0.5, 0.05, disabled=not adds
        )
        aside = bound.toggle(
            state, "flow.without_sinks", "Without sinks", help="the attention to sinks counts as no movement"
        )
    settings: dict[str, Any] = {"heads": heads, "add_residual": adds, "residual": weight}
    return query, methods, settings | ({"without": "sinks"} if aside else {})


def rows_of(
    state: State, run: Run, measure: Measure, methods: Sequence[str], query: int, settings: Mapping[str, Any],
    name: str,
) -> tuple[Rows, bool]:  # fmt: skip
    """The rows that are there so far, and whether these are all. What does not fit is said once, in one line; `name`
    is the run's."""
    found: dict[str, Row | str] = {}
    same, whole = run.identity, True
    if quick := tuple(m for m in flows.QUICK if m in methods):
        rows = wait(
            ("flow of the record", same, quick, query, tuple(settings.items())),
            lambda: flows.of_records(run, quick, query, settings),
            f"{len(quick)} methods of the maps, run {name}", model=run.name, lane="light", patience=1.0,
        )  # fmt: skip
        whole = rows is not None
        found |= rows or {}
    asked = tuple(m for m in methods if m in flows.OF_ANSWER)
    if asked and not _explains(measure):
        st.info(
            plain(
                f"The measure is {measure.label}: {_names(asked)} and relevance explain an answer and are left out."
            )
        )
        methods = [m for m in methods if m not in (*flows.OF_ANSWER, "relevance", "gradient_rollout")]
        asked = ()
    of_token = tuple(m for m in methods if m not in (*flows.QUICK, *flows.OF_ANSWER))
    for which, part in ((of_token, (query, tuple(settings.items()))), (asked, ())):
        if which:
            more = wait(
                ("flow", same, measure.key, which, part),
                lambda which=which: flows.of_model(state, run, measure, which, query, settings),
                f"{len(which)} methods of {'the answer' if which == asked else 'the token'}, run {name}",
                model=run.name,
            )
            whole = whole and more is not None
            found |= more or {}
    left = {method: told for method, told in found.items() if isinstance(told, str)}
    if left:
        st.info(plain("Not here: " + "; ".join(f"{METHODS[m]} ({told})" for m, told in left.items())))
    return {m: row for m in METHODS if isinstance(row := found.get(m), Row)}, whole


def _explains(measure: Measure) -> bool:
    return measure.answer is not None or measure.kind == "match"


def _names(methods: Sequence[str]) -> str:
    return ", ".join(METHODS[m] for m in methods)


def draw_strips(state: State, run: Run, rows: Rows, query: int, other: Rows | None) -> None:
    """A strip per method; with `other`, those of run B below it and the difference."""
    tokens, shares = flows.on_one_axis(rows.values())
    lines = {METHODS[m]: share for m, share in shares.items()}
    if other is not None:
        lines = {}
        for method, share in shares.items():
            lines[f"{METHODS[method]}, A"] = share
            if method in other:
                second = flows.beside(rows[method], other[method], tokens)
                lines[f"{METHODS[method]}, B"] = second
                lines[f"{METHODS[method]}, B − A"] = second - share
    places = _strongest(np.stack(list(lines.values())), _words(run, rows, len(tokens)))
    if not places:  # all are patches
        return
    offset = len(tokens) - len(run.queries)
    title = escaped(f"Where {quoted(run.queries[query])} (token {query}) comes from")
    figure = figures.strips(
        tokens, places, {name: values[places] for name, values in lines.items()}, title, "share",
        subtitle="weight ÷ sum of the sizes, so that all methods have one scale · click a token to choose it",
        chosen=query + offset,
    )  # fmt: skip
    seen = "; ".join(f"{name}: {_largest(tokens, values)}" for name, values in lines.items())
    st.html(f"<style>{STYLE}</style>")
    with st.container(key="flow-strips"):
        point = clicked(figure, "flow-strips-figure", f"Largest share by method: {seen}")
    words = _words(run, rows, len(tokens))
    if len(places) < len(words):
        left = [place for place in words if place not in places]
        rest = np.max(np.nan_to_num(np.abs(np.stack(list(lines.values()))[:, left])))
        st.caption(
            f"The {len(places)} tokens with the most weight of {len(words)}; the others have {rest:.2g} or less."
        )
    if point is not None:
        place = int(point["customdata"]) - offset
        if 0 <= place < len(run.queries):
            state.query = place
            session.again()
        st.caption("A token of the other side can not be followed: it is looked at, and does not look.")
    numbers("flow", flows.table(rows.values()), "flow-numbers", figure)


def _words(run: Run, rows: Rows, count: int) -> list[int]:
    """Positions of the tokens that are not drawn as patches of a picture."""
    shape = picture.grid(run)
    patches: list[int] = []
    if shape is not None and shape[0] == 1 and count == len(run.keys):
        found = grid_of(next(iter(rows.values())).array, "key")
        patches = [] if found is None else found[2]
    return [place for place in range(count) if place not in set(patches)]


def _strongest(lines: np.ndarray, places: list[int]) -> list[int]:
    most = np.nanmax(np.nan_to_num(np.abs(lines)), axis=0)
    return sorted(sorted(places, key=lambda place: -most[place])[:MOST_TOKENS])


def _largest(tokens: Sequence[str], values: np.ndarray) -> str:
    if not np.isfinite(values).any():
        return "no value"
    place = int(np.nanargmax(np.abs(values)))
    return f"{place} {quoted(tokens[place])} {values[place]:.2f}"


def draw_pictures(state: State, run: Run, rows: Rows, query: int) -> None:
    """The shares of the patches over the picture, all methods on one scale; a click on a patch chooses it."""
    shape = picture.grid(run)
    drawn = {m: row for m, row in rows.items() if len(row.tokens) == len(run.keys)}
    if shape is None or not drawn:
        return
    st.subheader("On the picture")
    if shape[0] > 1:
        _draw_film(state, drawn)
        return
    first = next(iter(drawn.values()))
    found = grid_of(first.array, "key")
    if found is None:
        return
    rows_of_patches, columns, places = found
    size = (rows_of_patches, columns)
    grids = {METHODS[m]: row.share[places].reshape(size) for m, row in drawn.items()}
    figure = figures.over_picture(
        grids, picture.pixels(run), np.array(places).reshape(size), "Shares of the patches", "share",
        query if run.square else None,
    )  # fmt: skip
    told = "; ".join(
        f"{METHODS[m]}: patch {_largest([first.tokens[p] for p in places], row.share[places])}"
        for m, row in drawn.items()
    )
    point = clicked(figure, "flow-picture", f"Patch with the largest share: {told}")
    numbers("flow-patches", flows.table(rows.values()), "flow-picture-numbers", figure)
    if point is not None and run.square:
        state.query = int(point["customdata"])
        session.again()


def _draw_film(state: State, rows: Rows) -> None:
    method = bound.choice(state, "flow.film", "Method", list(rows), show=METHODS.__getitem__)
    shared = rows[method].array.copy(data=rows[method].share)
    shared.attrs = {"unit": "share"}
    kept = [name for name in shared.coords if str(name).startswith("query") or name in ("batch", "position")]
    figure = hw.figure(hw.on_grid(shared.drop_vars(kept)), title=METHODS[method])
    chart(figure, "flow-film", f"{METHODS[method]}: {_largest(rows[method].tokens, rows[method].share)}")
    numbers("flow-film", flows.table(rows.values()), "flow-film-numbers", figure)


def draw_belief(state: State, run: Run, measure: Measure, rows: Rows) -> None:
    """Faithfulness curves and rank agreement."""
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Does the answer depend on them?")
        if run.of_record:
            records.draw_needs(run.name, "whether the answer depends on them")
        else:
            _faithfulness(state, run, measure, rows)
    with right:
        st.subheader("Do the methods agree?")
        found = flows.agreement(list(rows.values()))
        named = found.assign_coords(
            attribution=[METHODS[m] for m in rows], other=[METHODS[m] for m in rows]
        ).assign_attrs(unit="Kendall's τ of the sizes")
        pairs = [
            (float(found[i, j]), a, b)
            for i, a in enumerate(rows) for j, b in enumerate(rows) if i < j and np.isfinite(found[i, j])
        ]  # fmt: skip
        told = (
            f"least alike {METHODS[min(pairs)[1]]} and {METHODS[min(pairs)[2]]}, {min(pairs)[0]:.2f}"
            if pairs
            else ""
        )
        figure = hw.figure(named, title="Rank agreement")
        chart(figure, "flow-agreement", f"Rank agreement: {told}")
        numbers("agreement", tables.table(named, "agreement"), "agreement-numbers", figure)
        st.caption(plain(f"Not for: {entry('agreement').not_for}."))


def _faithfulness(state: State, run: Run, measure: Measure, rows: Rows) -> None:
    if not _explains(measure):
        st.caption(plain(f"The measure is {measure.label}: the curves are of an answer."))
        return
    work = ("faithfulness", run.identity, measure.key,
            tuple((m, row.values.tobytes()) for m, row in rows.items()))  # fmt: skip

    curves = lambda: flows.faithfulness(state, run, measure, list(rows.values()))  # noqa: E731
    found = fitting(work, curves, "faithfulness of the methods", model=run.name)
    if found is None:
        return
    which = bound.segments(state, "flow.curve", "Curve", list(FACES), show=FACES.__getitem__)
    names = [METHODS.get(name, name) for name in map(str, found.attribution.values)]
    lines = dict(zip(names, found[str(which)].isel(batch=0).values, strict=True))
    areas = dict(zip(names, found[f"{which}_area"].isel(batch=0).values.tolist(), strict=True))
    best = sorted(areas, key=areas.__getitem__, reverse=which == "insertion")
    told = ", ".join(f"{name} {tables.said(areas[name], '.3g')}" for name in best)
    figure = figures.curves(found.fraction.values, lines, escaped(measure.label), measure.unit or "value")
    chart(figure, f"flow-{which}", f"Areas under the curves, best first: {told}")
    st.caption(plain(f"Mean height, best first: {told}."))
    numbers(
        f"faithfulness-{which}",
        tables.table(found[which].isel(batch=0), which),
        "faithfulness-numbers",
        figure,
    )
    st.caption(plain(f"Not for: {entry('faithfulness').not_for}."))


def draw_methods(methods: Sequence[str]) -> None:
    """What each method is, costs, and must not be used for."""
    with st.expander("What each method is of, what it costs, and what it is not for"):
        st.dataframe(
            pd.DataFrame(
                [
                    {"method": METHODS[m], "asks": entry(m).question, "not for": entry(m).not_for,
                     "cost": entry(m).cost, "unit": entry(m).unit}
                    for m in methods
                ]
            ),
            hide_index=True, key="flow-methods-table", alt="Methods, their questions, costs and limits",
        )  # fmt: skip


def draw_paths(state: State, run: Run, query: int, settings: Mapping[str, Any]) -> None:
    """The graph of layers and positions below the chosen token; a click on an edge shows its heads."""
    st.subheader("Along which paths")
    if len(run.keys) > flows.MOST_IN_GRAPH:
        st.caption(
            f"The graph is drawn for up to {flows.MOST_IN_GRAPH} tokens; this input has {len(run.keys)}."
        )
        return
    least = bound.slider(
        state, "flow.least", "Edges that carry at least", 0.005, 0.3, 0.02, 0.005, format="%.3f"
    )

    key = ("paths", run.identity, query, tuple(settings.items()))
    work = lambda: flows.paths(run, query, 0.005, settings)  # noqa: E731
    found = fitting(key, work, "paths of the token", model=run.name)
    if found is None:
        return
    edges = found.edges[found.edges["share"] >= least].assign(below=lambda e: e["depth"] - 1)
    kept = state.listed("flow.edge")
    chosen = kept if _is_edge(found.edges, kept) else None
    figure = figures.paths(
        edges, found.mass, found.tokens, found.layers,
        escaped(f"What of {quoted(run.queries[query])} passes where, by rollout"),
        f"{len(edges)} edges that carry {least:.1%} or more · click the middle of an edge for its heads", chosen,
    )  # fmt: skip
    top = edges[edges["query"] != edges["key"]].nlargest(4, "share")
    told = "; ".join(
        f"layer {e.layer} {quoted(found.tokens[e.query])} from {quoted(found.tokens[e.key])} {e.share:.0%}"
        for e in top.itertuples()
    )
    point = clicked(figure, "flow-paths", f"Strongest edges between tokens: {told}")
    if point is not None and isinstance(point.get("customdata"), list):
        state.put("flow.edge", [int(each) for each in point["customdata"][:3]])
        session.again()
    numbers("paths", edges.drop(columns="below"), "paths-numbers", figure)
    if chosen is not None and len(found.tokens) == len(run.queries) and run.square:
        _heads(state, run, found, chosen)


def _is_edge(edges: pd.DataFrame, edge: Sequence[Any]) -> bool:
    """Whether an edge, which an address may have brought, is one of these."""
    if len(edge) != 3 or not all(type(each) is int for each in edge):
        return False
    return bool((edges[["depth", "query", "key"]].to_numpy() == np.array(edge)).all(1).any())


def _heads(state: State, run: Run, found: flows.Paths, edge: Sequence[int]) -> None:
    """The weights of the heads of one edge; a button opens a head there."""
    depth, query, key = edge
    layer = found.layers[depth - 1]
    weights = flows.heads_of_edge(run, layer, query, key)
    order = np.argsort(-weights, kind="stable")
    named = f"{quoted(run.queries[query])} → {quoted(run.keys[key])}"
    st.markdown(plain(f"Layer {layer}, {named}: the weight of each head"))
    with st.container(horizontal=True, key="edge-heads"):
        for head in order[:8].tolist():
            if st.button(plain(f"{layer}.{head}  {weights[head]:.3f}"), key=f"edge-head-{head}"):
                state.choose_head(layer, head)
                state.query, state.key = query, key
                st.switch_page(pages.page("head"), query_params=to_address(state))
