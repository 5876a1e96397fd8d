"""What the page Circuits shows: the graph, what is chosen in it, how much of the measure it carries, overlap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pandas as pd
import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.analyses._catalogue.graph import stability
from headwater.dashboard import tables
from headwater.dashboard.charts.circuit import circuit_layers, size_curve, strongest
from headwater.dashboard.parts.circuit_curve import draw_curve
from headwater.dashboard.parts.job import fitting
from headwater.dashboard.running import circuits, pairs, runs
from headwater.dashboard.running.circuits import ANALYSIS, METHODS, Circuit
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.pairs import Corrupt
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, clicked, numbers, plain, token_name
from headwater.lens.errors import HeadwaterError

FIRST = 60  # edges that are drawn before anybody asks for more
MOST = 400
COLUMNS: dict[str, Any] = {
    name: st.column_config.NumberColumn(format="%.3g") for name in ("share", "chance", "p")
}
COLUMNS |= {"both": "in both", "only_a": "only in this", "only_b": "only in the other"}
REMOVED, GROUPS, EDGE = "circuits.removed", "circuits.groups", "circuits.edge"


def _size(state: State, found: Circuit) -> int:
    """How many edges are drawn."""
    return bound.held_number(state, "circuits.size", 1, min(found.count, MOST), min(FIRST, found.count))


def steps_of(state: State) -> int:
    return bound.held_number(state, "circuits.steps", 1, 50, 5)


def choose_corrupt(state: State, chosen: Measure) -> Corrupt | None:
    """The corrupt input, with a field for another; None where there is none yet."""
    offered = pairs.pictures(state)
    if offered:
        bound.choice(
            state, pairs.PICTURE, "Corrupt picture", offered, offered[0],
            show=lambda name: name.removeprefix(pairs.SAMPLE),
        )  # fmt: skip
    try:
        found = pairs.corrupt(state, chosen)
    except HeadwaterError as error:
        found = None
        st.info(plain(str(error)))
    if not offered and state.b_text is None:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            text = found.key[0] if found is not None else ""
            bound.text(
                state, pairs.TYPED, "Corrupt prompt", text, width="stretch",
                help="the same number of tokens, another answer; an edge is judged by what it carries there",
            )  # fmt: skip
            st.button("Draw another", key="draw-corrupt", on_click=_draw_another, args=(chosen, text))
    if found is not None:
        st.caption(plain(f"Corrupt: {found.key[0] or found.told} ({found.told})"))
    return found


def _draw_another(chosen: Measure, now: str) -> None:
    state = session.current()
    texts = [text for text, _ in pairs.found(state, chosen)]
    if texts:
        place = texts.index(now) + 1 if now in texts else 0
        state.put(pairs.TYPED, texts[place % len(texts)])
        session.touch()


def circuit(
    state: State, run: Run, chosen: Measure, method: str, query: int, other: Corrupt | None, name: str = "A"
) -> Circuit | None:
    """The graph of the chosen method; None while it is under way, or where something is missing."""
    key: tuple[Any, ...] = ("circuit", *run.identity, method, query)
    what = f"{METHODS[method]}, run {'B' if state.shown == 'b' else name}"
    if method == "edges":
        if run.edits != "[]":
            st.info(
                "Effects of edges are those in a model as it is, and run B has edits: choose run A at the top, or "
                "another method."
            )
            return None
        if other is None:
            return None
        steps = bound.number(state, "circuits.steps", "Steps", 1, 50, 5) if name == "A" else steps_of(state)
        key += (*chosen.key, other.key, steps)
        return fitting(
            key, lambda: circuits.of_edges(state, run, chosen, other.example, steps), what, model=run.name
        )
    if method == "routes":
        return fitting(key, lambda: circuits.of_routes(state, run, query), what, model=run.name)
    root = f"{state.layer}.{state.head}" if state.get("circuits.root", "all") == "head" else None
    source = state.key if root is not None and state.key is not None and state.key < len(run.keys) else None
    key += (root, source)
    return fitting(key, lambda: circuits.of_trace(state, run, query, root, source), what, model=run.name)


def choose_method(state: State, run: Run) -> tuple[str, int]:
    """The method and the query position."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="circuit-settings"):
        method = bound.segments(
            state, "circuits.method", "Method", list(METHODS), show=METHODS.__getitem__, width="content"
        )
        first = run.position if run.position is not None else len(run.queries) - 1
        query = first if state.query is None else min(state.query, len(run.queries) - 1)
        if method != "edges":
            bound.choice(
                state, "circuits.query", "Token", list(range(len(run.queries))), query, width=220,
                show=lambda place: token_name(run.queries, place), then=_take_query,
            )  # fmt: skip
        if method == "trace":
            bound.segments(
                state, "circuits.root", "From", ["all", "head"], width="content",
                show=lambda name: "all heads that fire" if name == "all" else f"head {state.layer}.{state.head}",
            )  # fmt: skip
    return method, query


def _take_query(state: State) -> None:
    state.query = cast("int", state.settings.pop("circuits.query"))


def removed(state: State) -> list[str]:
    return [str(name) for name in state.listed(REMOVED)]


def groups(state: State) -> dict[str, list[str]]:
    """Groups of nodes by their names."""
    rows = [row for row in state.listed(GROUPS) if isinstance(row, list) and len(row) > 1]
    return {str(row[0]): [str(node) for node in row[1:]] for row in rows}


def draw_graph(state: State, run: Run, found: Circuit, method: str) -> pd.DataFrame:
    """The strongest edges as a graph to click, and what is behind them; gives the edges that are drawn."""
    count = found.count
    size = FIRST
    if count > 10:
        size = bound.slider(
            state, "circuits.size", "Edges", 1, min(count, MOST), min(FIRST, count),
            help="the strongest by the size of their weight",
        )  # fmt: skip
    gone = removed(state)
    edges = circuits.grouped(found.best(size, gone), groups(state))
    if edges.empty:
        st.info(
            "No edges: nothing before it is read here, or all of it is removed. Choose another head or token."
        )
        return edges
    about = entry(ANALYSIS[method])
    pick = state.get(EDGE)
    chosen = int(pick) if isinstance(pick, int) and 0 <= pick < len(edges) else None
    threshold = cast("float", edges["weight"].abs().min())
    figure = circuit_layers(
        edges, max(run.layers) + 1, run.n_heads, run.queries, METHODS[method].capitalize(), found.name,
        subtitle=f"{len(edges)} of {count} edges, |{found.name}| from {threshold:.3g}", chosen=chosen,
        pinned=state.pins, groups=groups(state),
    )  # fmt: skip
    point = clicked(figure, f"circuit-{method}", f"{METHODS[method]}: {strongest(edges)}")
    if point is not None and "customdata" in point:
        _take(state, *point["customdata"][:2])
    st.caption(plain(f"Unit: {about.unit}. Not for: {about.not_for}."))
    st.caption(plain(f"Stability: {stability(found.graph.graph) or 'not known'}."))
    st.caption("Click the diamond on an edge to open it, a node to choose its head. Orange is negative.")
    numbers(
        f"circuit-{method}",
        edges.drop(columns=["sender node", "reader node"]),
        f"circuit-{method}-numbers",
        figure,
    )
    return edges


def _take(state: State, kind: str, value: Any) -> None:
    if kind == "edge":
        state.put(EDGE, int(value))
    elif (head := circuits.head_of(str(value))) is not None:
        state.choose_head(*head)
        if (place := circuits.position_of(str(value))) is not None:
            state.query = place
        state.put("circuits.node", str(value))
    else:
        state.put("circuits.node", str(value))
    session.again()


def draw_nodes(state: State, edges: pd.DataFrame) -> None:
    """Remove nodes, name groups of them, pin heads."""
    names = sorted({*edges["sender"], *edges["reader"]})
    gone, named = removed(state), groups(state)
    with st.expander("Nodes: remove, group, pin", expanded=bool(gone or named)):
        bound.several(state, REMOVED, "Removed", [*names, *(name for name in gone if name not in names)])
        node = state.get("circuits.node")
        free = [name for name in names if name not in named]
        picked = bound.several(
            state, "circuits.picked", "Picked nodes", free, [node] if node in free else [],
            help="a click on a node of the figure picks it while nothing else is picked",
        )  # fmt: skip
        with st.container(horizontal=True, vertical_alignment="bottom"):
            name = bound.text(state, "circuits.name", "Name of the group", "", width=220, max_chars=30)
            if st.button("Group", key="group-nodes", disabled=len(picked) < 2 or not name or name in names):
                state.put(GROUPS, [*([k, *v] for k, v in named.items()), [name, *picked]])
                state.settings.pop("circuits.picked", None)
                state.settings.pop(EDGE, None)
                session.again()
            if st.button("Remove", key="remove-nodes", disabled=not picked):
                state.put(REMOVED, list(dict.fromkeys([*gone, *picked])))
                state.settings.pop("circuits.picked", None)
                state.settings.pop(EDGE, None)
                session.again()
            heads = [head for each in picked if (head := circuits.head_of(each)) is not None]
            if st.button("Pin heads", key="pin-nodes", disabled=not heads):
                for layer, head in dict.fromkeys(heads):
                    state.pin(f"{layer}.{head}")
                session.again()
            for group in named:
                if st.button(plain(f"Ungroup {group}"), key=f"ungroup-{group}"):
                    state.put(GROUPS, [[k, *v] for k, v in named.items() if k != group])
                    session.again()


def draw_faithfulness(state: State, run: Run, chosen: Measure, found: Circuit, other: Corrupt) -> None:
    """How much of the measure's difference the circuit carries, by its number of edges, and at the chosen number."""
    st.subheader("How much of the answer does it carry?")
    size = _size(state, found)
    how = bound.segments(
        state, "circuits.how", "Edges are chosen", ["top", "greedy"], width="content",
        show=lambda name: "by their weight alone" if name == "top" else "from the answer downwards",
    )  # fmt: skip
    gone = [node.partition("@")[0] for node in removed(state)]
    same = (*run.identity, *chosen.key, other.key, steps_of(state), how)

    def at_size() -> dict[str, float]:
        graph = circuits.kept(found, size, how, gone)
        left = len(circuits.edges_of(graph))
        return {"edges": left, **circuits.carries(state, run, chosen, other.example, graph)}

    now = fitting(
        ("carries", *same, size, tuple(gone)), at_size, f"faithfulness of {size} edges", model=run.name
    )
    if now is not None:
        for column, (label, value) in zip(
            st.columns(3),
            (
                ("Faithfulness", f"{now['faithfulness']:.1%}"),
                ("Edges with a way to the answer", f"{now['edges']:.0f}"),
                (f"Its measure, of {now['whole']:.4g} {chosen.unit}".rstrip(), f"{now['circuit']:.4g}"),
            ),
            strict=True,
        ):
            column.metric(label, value)
    sizes = circuits.sizes_of(found.count)
    curve = fitting(
        ("faithfulness", *same),
        lambda: circuits.faithfulness(state, run, chosen, other.example, found, sizes, how),
        "faithfulness by size", model=run.name,
    )  # fmt: skip
    if curve is None:
        return
    lines = {name: curve["mean"].sel(score=name).values for name in ("faithfulness", "completeness")}
    figure = size_curve(sizes, lines, size, "Share of the difference that the best edges carry")
    worth = ", ".join(f"{n}: {v:.2f}" for n, v in zip(sizes, lines["faithfulness"], strict=True))
    chart(figure, "faithfulness", f"Faithfulness by number of edges: {worth}")
    st.caption(
        plain(f"Not for: {entry('circuit_faithfulness').not_for}. Completeness: of the edges left over.")
    )
    frame = pd.DataFrame({"edges asked for": sizes, "edges": curve["edges"].values, **lines})
    numbers("circuit-faithfulness", frame, "faithfulness-numbers", figure)
    draw_curve(state, run, chosen, found, other, how, same)


def draw_overlap(
    state: State, run: Run, chosen: Measure, found: Circuit, method: str, query: int, other: Corrupt | None
) -> None:
    """What the circuit has in common with that of run B, or with itself at another number of edges."""
    st.subheader("Overlap")
    second = runs.b(state)
    same_model = second is not None and second.name == run.name and (second.layers, second.n_heads) == (
        run.layers, run.n_heads,
    )  # fmt: skip
    options = ["size", *(["b"] if same_model else [])]
    against = bound.segments(
        state, "circuits.against", "With", options, "size", width="content",
        show=lambda name: "run B" if name == "b" else "another number of edges",
    )  # fmt: skip
    size = _size(state, found)
    with_size, one_more = size, found
    if against == "b" and second is not None:
        one_more = circuit(state, second, chosen, method, query, other, "B")
        if one_more is None:
            return
    else:
        most = len(found.edges)
        with_size = int(bound.number(state, "circuits.size_b", "Edges", 1, most, min(2 * size, most)))
    graphs = tuple(_cut(each, count) for each, count in ((found, size), (one_more, with_size)))
    shared = circuits.overlap(found, one_more, graphs)  # type: ignore[arg-type]
    frame = shared.to_dataframe().reset_index()
    st.dataframe(frame, hide_index=True, key="overlap", column_config=COLUMNS, alt=_overlap_alt(frame))
    st.caption(plain(f"Not for: {entry('circuit_overlap').not_for}."))
    st.download_button(
        "CSV",
        lambda: tables.to_csv(frame),
        "circuit-overlap.csv",
        "text/csv",
        key="overlap-csv",
        on_click="ignore",
    )


def _cut(found: Circuit, count: int) -> Any:
    """The graph of the strongest edges."""
    keep = {(e["sender"], e["sender node"], e["reader node"]) for e in found.best(count).to_dict("records")}
    ends = {(sender, node) for _, sender, node in keep}
    graph = found.graph.copy()
    graph.remove_edges_from([edge for edge in circuits.edges_of(graph) if edge not in ends])
    live = {node for edge in ends for node in edge}
    heads = {
        head for node in live if graph.nodes[node].get("kind") == "input" for head in graph.successors(node)
    }
    return graph.subgraph(live | heads).copy()


def _overlap_alt(frame: pd.DataFrame) -> str:
    rows: Mapping[str, Any] = frame.set_index("what")["share"].to_dict()
    return "Share in common: " + ", ".join(f"{what} {tables.said(share)}" for what, share in rows.items())
