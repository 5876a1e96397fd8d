"""From which tokens a token or the answer draws, by several methods on the same tokens, and the paths of a rollout.

A row of a method holds one number per token of the input. Rows of methods have units of their own; `share` brings them
on one scale. Methods of the answer explain the page's measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import headwater as hw
from headwater.analyses._catalogue.catalogue import Entry, entry
from headwater.dashboard.running.compare import aligned
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run, editing, model_of
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError
from headwater.lens.progress import progress

OF_RECORD = ("raw_attention", "rollout", "flow")
OF_ANSWER = ("input_x_gradient", "integrated_gradients")
METHODS = {
    "raw_attention": "attention, last layer",
    "rollout": "rollout",
    "flow": "attention flow",
    "norms": "norms, last layer",
    "globenc": "GlobEnc (norms)",
    "alti": "ALTI (norms)",
    "value_zeroing": "value zeroing",
    "relevance": "relevance",
    "gradient_rollout": "gradient rollout",
    "input_x_gradient": "input × gradient",
    "integrated_gradients": "integrated gradients",
}
QUICK = ("raw_attention", "rollout")  # of the record alone: no job
FIRST = (*QUICK, "flow", "norms", "alti", "value_zeroing", "relevance", *OF_ANSWER)
SLOW = ("flow", "alti", "value_zeroing", "integrated_gradients")
LONG = 128  # tokens from which slow methods are not chosen at first
MOST_IN_GRAPH = 200  # tokens


@dataclass(frozen=True)
class Row:
    """Weights [token] of one method, in its unit; `told` is what the result says of itself beside them."""

    method: str
    array: xr.DataArray
    told: tuple[str, ...] = ()

    @property
    def values(self) -> np.ndarray:
        return self.array.values

    @property
    def tokens(self) -> list[str]:
        return [str(token) for token in self.array["key_token"].values]

    @property
    def share(self) -> np.ndarray:
        """The weights over the sum of their sizes, so that all methods have one scale; 0 where all are 0."""
        total = np.nansum(np.abs(self.values))
        return self.values / total if total else self.values


def methods_at_first(run: Run) -> list[str]:
    """Those that are chosen before anybody chooses; slow ones on short texts alone."""
    return [name for name in FIRST if name in methods_of(run) and (len(run.keys) <= LONG or name not in SLOW)]


def methods_of(run: Run) -> list[str]:
    """All methods; of a record those that need no model."""
    return list(OF_RECORD) if run.of_record else list(METHODS)


def query_at_first(run: Run) -> int:
    """The token that the answer is read at: the one that predicts, the last, or of classifiers and towers the first."""
    if run.position is not None and run.position < len(run.queries):
        return run.position
    return len(run.queries) - 1 if run.causal or not run.square else 0


def of_record(run: Run, method: str, query: int, settings: Mapping[str, Any]) -> Row:
    """A row of the record of the run."""
    chosen = dict(settings) if method != "raw_attention" else {}
    if chosen and run.record.mixers:
        chosen["mixers"] = "effective"
    return _row(method, entry(method).function(run.record, queries=[query], **chosen))


def of_records(
    run: Run, methods: Sequence[str], query: int, settings: Mapping[str, Any]
) -> dict[str, Row | str]:
    """Rows of the record by method, or the line that says why there is none."""
    found: dict[str, Row | str] = {}
    for method in methods:
        try:
            found[method] = of_record(run, method, query, settings)
        except HeadwaterError as error:
            found[method] = str(error)
    return found


def of_model(
    state: State, run: Run, measure: Measure, methods: Sequence[str], query: int, settings: Mapping[str, Any]
) -> dict[str, Row | str]:
    """Rows by method, or the line that says why there is none; the edits of the run are in force."""
    model, found = None if run.of_record else model_of(state, run), {}
    with editing(run):
        for method in progress(methods, desc="methods", unit="method"):
            try:
                found[method] = _of_model(model, run, measure, method, query, settings)
            except HeadwaterError as error:
                found[method] = str(error)
    return found


def _of_model(
    model: hw.HookedModel | None,
    run: Run,
    measure: Measure,
    method: str,
    query: int,
    settings: Mapping[str, Any],
) -> Row:
    if method in OF_RECORD or model is None:
        return of_record(run, method, query, settings)
    analysis = entry(method)
    asked = _asked(measure, run, analysis)
    if method not in OF_ANSWER:
        asked["queries"] = [query]
    found = analysis.function(model, run.example, **asked)
    if method == "norms":
        found = found["norm"].isel(layer=-1).assign_attrs({**found.attrs, "unit": "norm"})
    row = _row(method, found)
    if method == "relevance":  # each token begins with 1 of itself, which says nothing of where it draws from
        own = query + len(row.tokens) - len(run.queries)
        if 0 <= own < len(row.tokens):
            row.array.values[own] -= 1
    return row


def _asked(measure: Measure, run: Run, analysis: Entry) -> dict[str, Any]:
    """What an analysis is asked about: the measure, where it explains an answer."""
    takes = {setting.name for setting in analysis.settings}
    return measure.of_run(run).fitting(analysis) if "answer" in takes else {}


def _row(method: str, found: xr.DataArray) -> Row:
    array = found.isel(batch=0)
    array = array.isel(query=0) if "query" in array.dims else array
    told = tuple(
        f"{name.replace('_', ' ')}: {found.attrs[name]}"
        for name in ("one_token", "set_aside")
        if name in found.attrs
    )
    unit = str(found.attrs.get("unit") or entry(method).unit)
    # only the unit: xarray takes an array with an attribute "keys" for a mapping
    return Row(
        method,
        xr.DataArray(array.values.astype(np.float64), array.coords, array.dims, attrs={"unit": unit}),
        told,
    )


def on_one_axis(rows: Iterable[Row]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The tokens of the widest row and the shares of all on them; a row of one side alone has NaN on the other."""
    rows = list(rows)
    widest = max(rows, key=lambda row: len(row.tokens))
    return widest.tokens, {row.method: _placed(row.tokens, row.share, widest.tokens) for row in rows}


def beside(row: Row, other: Row, tokens: Sequence[str]) -> np.ndarray:
    """The shares of `other`, at the tokens of `row` to which its own belong, on the axis `tokens`; NaN where it has
    none."""
    share = np.full(len(row.tokens), np.nan)
    for here, there in aligned(row.tokens, other.tokens).pairs:
        if here is not None and there is not None:
            share[here] = other.share[there]
    return _placed(row.tokens, share, tokens)


def _placed(own: list[str], share: np.ndarray, tokens: Sequence[str]) -> np.ndarray:
    cells = np.full(len(tokens), np.nan)
    if own == list(tokens[-len(share) :]):  # the own tokens stand behind those of the source
        cells[len(cells) - len(share) :] = share
    elif own == list(tokens[: len(share)]):
        cells[: len(share)] = share
    return cells


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per method and token: the weight in its own unit, and the share."""
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "method": row.method, "position": np.arange(len(row.tokens)), "token": row.tokens,
                    "weight": row.values, "share": row.share,
                    "unit": row.array.attrs["unit"],
                }
            )
            for row in rows
        ],
        ignore_index=True,
    )  # fmt: skip


def agreement(rows: Sequence[Row], by: str = "kendall") -> xr.DataArray:
    """How alike the orders of the tokens are, [attribution, other]; NaN for rows on other tokens."""
    found = np.full((len(rows), len(rows)), np.nan)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if one.tokens == other.tokens and not (
                np.isnan(one.values).any() or np.isnan(other.values).any()
            ):
                found[i, j] = hw.analyses.between(np.abs(one.values), np.abs(other.values), by=by)  # type: ignore[arg-type]
    names = [row.method for row in rows]
    return xr.DataArray(found, {"attribution": names, "other": names}, ("attribution", "other"))


def faithfulness(
    state: State, run: Run, measure: Measure, rows: Sequence[Row], steps: int = 10
) -> xr.Dataset:
    """The curves of the orders that these rows give, and of a random order; the edits of the run are in force.

    AnalysisError where the measure is of no answer, or where no row covers the input.
    """
    model, analysis = model_of(state, run), entry("faithfulness")
    given = {row.method: np.nan_to_num(row.values)[None] for row in rows}
    with editing(run):
        return analysis.function(
            model, [run.example], given, steps=steps, draws=10, **_asked(measure, run, analysis)
        )


@dataclass(frozen=True)
class Paths:
    """Edges of a rollout from one token: `edges` has columns depth, layer, query, key, share and weight; the shares of
    the edges of one depth sum to 1. `mass` [depth, position] is what reaches each node, depth 0 the input."""

    edges: pd.DataFrame
    mass: np.ndarray
    layers: list[int]
    tokens: list[str]


def paths(run: Run, query: int, least: float, settings: Mapping[str, Any]) -> Paths:
    """The paths along which the rollout of a token runs, the edges that carry at least `least` of it.

    AnalysisError for texts of more than 1,024 tokens, and for maps of which no product can be made.
    """
    more = {"mixers": "effective"} if run.record.mixers else {}
    graph = hw.analyses.flow_graph(run.record, **dict(settings), **more)
    count = 1 + max(position for _, position in graph)
    depths = 1 + max(depth for depth, _ in graph)
    offset = count - len(run.queries)  # the source's tokens come first
    mass = np.zeros((depths, count))
    mass[-1, query + offset] = 1.0
    lines = []
    for depth in range(depths - 1, 0, -1):
        for i in np.flatnonzero(mass[depth]):
            for _, (_, j), data in graph.out_edges((depth, int(i)), data=True):
                share = mass[depth, i] * data["capacity"]
                mass[depth - 1, j] += share
                if share >= least:
                    layer = graph.nodes[depth, int(i)]["layer"]
                    lines.append((depth, layer, int(i), int(j), share, data["capacity"]))
    edges = pd.DataFrame(lines, columns=["depth", "layer", "query", "key", "share", "weight"])
    layers = [int(graph.nodes[depth, 0]["layer"]) for depth in range(1, depths)]
    return Paths(edges, mass, layers, [str(graph.nodes[0, i]["token"]) for i in range(count)])


def heads_of_edge(run: Run, layer: int, query: int, key: int) -> np.ndarray:
    """The weight that each head of a layer puts on one pair, [head]."""
    return run.record.pattern(layer, queries=[query], keys=[key])[0, :, 0, 0].double().numpy()
