"""Labelled arrays as tables for a terminal.

One small table per matrix; where there are too many numbers the largest, counted as such. Rows carry their token where
the array has one, with control characters escaped.
"""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import numpy as np
import xarray as xr

from headwater.analyses._catalogue.graph import strongest
from headwater.command.columns import cell, columns

MOST_ROWS, MOST_COLUMNS = 40, 16


def of(result: xr.DataArray | xr.Dataset) -> list[str]:
    """Lines for every number of an array, or of each array of a set; lists of one length become one table."""
    if isinstance(result, xr.DataArray):
        return _array(result)
    lines: list[str] = []
    for dim in result.dims:
        listed = [name for name, array in result.data_vars.items() if array.dims == (dim,)]
        if len(listed) > 1:
            lines += ["", *_list(result[listed])]
            result = result.drop_vars(listed)
    for array in result.data_vars.values():
        lines += ["", *_array(array)]
    return lines[1:]


def of_graph(graph: nx.DiGraph) -> list[str]:
    """Lines for the edges of a graph by the size of their score (or weight), the largest first."""
    by, edges = strongest(graph)
    more = [name for name in ("low", "high", "count") if any(name in about for _, _, about in edges)]
    scored = [(u, v, about[by], *map(about.get, more)) for u, v, about in edges]
    told = [f"{len(graph)} nodes, {len(scored)} edges with a {by}"]
    if not scored:
        nodes = [(name, about[by]) for name, about in graph.nodes(data=True) if about.get(by) is not None]
        nodes.sort(key=lambda node: -abs(node[1]))
        if not nodes:
            return told
        return [f"{len(graph)} nodes, {len(nodes)} with a {by}", *columns([["node", by], *nodes[:MOST_ROWS]])]
    if len(scored) > MOST_ROWS:
        told += [f"the {MOST_ROWS} largest; --json gives every one"]
    return [*told, *columns([["from", "to", by, *more], *scored[:MOST_ROWS]])]


def _array(array: xr.DataArray) -> list[str]:
    """A value, a list, one matrix for each index before the last two, or the largest numbers; no axes of length one."""
    fixed = [
        f"{dim} {_labels(array, str(dim))[0]}"
        for dim in array.dims
        if array.sizes[dim] == 1 and dim != "batch"
    ]
    title = " · ".join([str(array.name or "value"), *fixed])
    array = array.squeeze()
    if array.ndim == 0:
        return [f"{title}: {cell(array.values[()])}"]
    if array.dtype == bool:
        return [f"{title}: {int(array.sum())} of {array.size} (--json says which)"]
    if array.ndim == 1 and array.size <= MOST_ROWS:
        (dim,) = map(str, array.dims)
        return [title, *columns([[dim, "value"], *zip(_labels(array, dim), array.values, strict=True)])]
    if array.ndim > 1 and array.size <= MOST_ROWS * MOST_COLUMNS and array.shape[-1] <= MOST_COLUMNS:
        return [title, *(line for part in _matrices(array) for line in part)]
    return [f"{title}: the {MOST_ROWS} largest of {array.size} (--json gives all)", *_largest(array)]


def _list(columns_of: xr.Dataset) -> list[str]:
    """Arrays over one axis beside each other, behind the names of its places; the first rows where there are many."""
    arrays = columns_of.data_vars
    dim, size = str(next(iter(columns_of.dims))), len(next(iter(arrays.values())))
    told = f"the first {MOST_ROWS} of {size} (--json gives all)" if size > MOST_ROWS else f"{size}"
    shown = {str(name): array.values[:MOST_ROWS] for name, array in arrays.items()}
    if dim in columns_of.coords:
        shown = {dim: _labels(columns_of, dim)[:MOST_ROWS]} | shown
    return [f"{dim}: {told}", *columns([list(shown), *zip(*shown.values(), strict=True)])]


def _matrices(array: xr.DataArray) -> Iterator[list[str]]:
    *outer, row, column = map(str, array.dims)
    for index in np.ndindex(*(array.sizes[dim] for dim in outer)):
        part = array.isel(dict(zip(outer, index, strict=True)))
        head = [f"{row} \\ {column}", *_labels(part, column)]
        body = [[name, *values] for name, values in zip(_labels(part, row), part.values, strict=True)]
        where = [" · ".join(f"{d} {_labels(array, d)[i]}" for d, i in zip(outer, index, strict=True))]
        yield [*(where if outer else []), *columns([head, *body])]


def _largest(array: xr.DataArray) -> list[str]:
    size = np.nan_to_num(np.abs(array.values.astype(float).ravel()), nan=-1.0)
    order = np.argsort(-size, kind="stable")[:MOST_ROWS]
    rows = []
    for index in zip(*np.unravel_index(order, array.shape), strict=True):
        place = dict(zip(array.dims, map(int, index), strict=True))
        # one axis at a time, the others fixed: a batch row has its own tokens
        axes = [
            (dim, array.isel({other: i for other, i in place.items() if other != dim})) for dim in array.dims
        ]
        rows.append([*(_labels(axis, str(dim))[place[dim]] for dim, axis in axes), array.values[index]])
    return columns([[*map(str, array.dims), "value"], *rows])


def _labels(array: xr.DataArray | xr.Dataset, dim: str) -> list[str]:
    """The coordinate of each place on an axis, with the side of the model and the token where the array has them.

    Tokens of each batch row count where all rows have the same, as the patches of pictures.
    """
    names = array.coords[dim].values if dim in array.coords else np.arange(array.sizes[dim])
    labels = [cell(place) for place in names]
    for name in (f"{dim}_part", f"{dim}_token", f"{dim}_text", "token"):
        if dim in ("batch", name) or name not in array.coords:
            continue
        told = array.coords[name]
        if told.dims == ("batch", dim) and bool((told == told[0]).all()):
            told = told[0]
        if told.dims == (dim,):
            labels = [f"{label} {cell(word)}" for label, word in zip(labels, told.values, strict=True)]
            if not name.endswith("_part"):
                break
    return labels
