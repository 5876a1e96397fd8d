"""Results as text for a terminal and as JSON for programs.

A terminal gets one small table per matrix, and where there are too many numbers the largest, counted as such; JSON
always has all of them, with null where a number is undefined. Token text is shown with control characters escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from headwater.dashboard.export import to_json
from headwater.lens.errors import AnalysisError

if TYPE_CHECKING:
    from headwater.analyses._catalogue import Entry
    from headwater.lens.record import Record

MOST_ROWS, MOST_COLUMNS = 40, 16
NO_MEAN = ("argmax", "visible")  # a column number and a count of queries: their mean says nothing


def as_json(result: Any) -> str:
    """Valid JSON of a result: arrays with their dimensions and coordinates, everything else by its fields."""
    return to_json(_fields(result))


def _fields(content: Any) -> Any:
    if isinstance(content, xr.DataArray | xr.Dataset):
        return content.to_dict()
    if is_dataclass(content):
        shown = [field.name for field in fields(content)]
        return {
            name: _fields(getattr(content, name)) for name in shown if not callable(getattr(content, name))
        }
    return [_fields(value) for value in content] if isinstance(content, list | tuple) else content


def as_text(result: xr.DataArray | xr.Dataset) -> str:
    """What was asked, then the numbers in tables; the last line says what they must not be used for."""
    told = result.attrs
    lines = [str(told["question"])] if told.get("question") else []
    lines += [f"unit: {told['unit']}"] if told.get("unit") else []
    arrays = result.data_vars.values() if isinstance(result, xr.Dataset) else [result]
    for array in arrays:
        lines += ["", *_array(array)]
    return "\n".join([*lines, "", f"not for: {told['not_for']}"] if told.get("not_for") else lines)


def as_page(result: xr.DataArray | xr.Dataset) -> str:
    """One web page that needs no network, with a figure of each array that a figure can draw."""
    from headwater.dashboard.figures.choose import figure

    arrays = list(result.data_vars.values()) if isinstance(result, xr.Dataset) else [result]
    drawn: list[str] = []
    reasons: list[str] = []
    for array in arrays:
        tokens = array.squeeze().coords.get("key_token")
        try:
            shown = figure(array, [] if tokens is None else [cell(token) for token in tokens.values.ravel()])
        except ValueError as error:
            reasons.append(f"{array.name}: {error}")
        else:
            drawn.append(shown.to_html(full_html=False, include_plotlyjs=not drawn))
    if not drawn:
        raise AnalysisError("; ".join(reasons))
    return '<!doctype html><meta charset="utf-8"><title>Headwater</title>\n' + "\n".join(drawn)


def summary(record: Record) -> str:
    """The mean of each statistic per layer, over heads and over the queries or keys that have one."""
    found = record.to_xarray()
    rows, seen = record.valid.shape
    size = f"{len(record.layers)} layers × {record.n_heads} heads"
    told = f"{rows} prompt{'s' * (rows != 1)}, up to {seen} tokens, {size}"
    names = [str(name) for name in found.data_vars if {"layer", "head"} <= set(found[name].dims)]
    names = [name for name in names if name not in NO_MEAN and "group" not in found[name].dims]
    means = [found[name].mean([dim for dim in found[name].dims if dim != "layer"]) for name in names]
    table = [
        ["layer", *names],
        *([layer, *(float(m[i]) for m in means)] for i, layer in enumerate(record.layers)),
    ]
    return "\n".join([told, *columns(table), "means over heads and tokens; --json gives every value"])


def models(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The embedded models, one on a line."""
    rows = ([name, about["description"]] for name, about in found.items())
    return "\n".join(columns([["name", "what it is"], *rows]))


def catalogue(entries: Mapping[str, Entry]) -> str:
    """The analyses, their questions and what they read."""
    rows = ([entry.name, entry.inputs, entry.question] for entry in entries.values())
    more = "headwater analyze NAME --about says what one computes, its settings and its source"
    return "\n".join([*columns([["analysis", "reads", "question"], *rows]), "", more])


def entry(found: Entry) -> str:
    """One analysis in full: question, settings, formula, cost, source, limits."""
    table = [["--set", "default", "kind", "meaning"]]
    for each in found.settings:
        default = each.default
        if isinstance(default, tuple | list):
            default = ",".join(map(str, default))
        table.append(
            [
                each.name,
                "none" if default is None else str(default),
                "|".join(each.choices) or each.kind,
                each.help,
            ]
        )
    facts = [f"{word}: {getattr(found, word)}" for word in ("unit", "inputs", "cost", "paper")]
    told = [found.question, *facts, f"not for: {found.not_for}", "", found.description]
    return "\n".join([*told, "", *columns(table)] if found.settings else told)


def health(found: Mapping[str, Any]) -> str:
    """The doctor's findings for a reader."""
    gib = 2**30
    torch, memory, network = found["torch"], found["memory"], found["network"]
    lines = [
        f"headwater {found['headwater']} on Python {found['python']}, {found['platform']}",
        f"torch {torch['version']} ({torch['build']} build, {torch['threads']} threads)",
        f"memory: {memory['available'] / gib:.1f} GiB free of {memory['total'] / gib:.1f} GiB",
        *(f"device {d['name']}: {d['model']}" for d in found["devices"]),
        "",
        *columns([["device", "backend", "works", "detail"], *map(_trial, found["backends"])]),
        "",
        *columns(
            [["package", "version"], *found["packages"].items(), *map(_optional, found["optional"].items())]
        ),
        "",
        f"embedded models: {', '.join(found['embedded_models']) or 'none: this installation is incomplete'}",
        f"network: {network['needed']}; hub {network['hub']}, cache {network['cache']}",
    ]
    return "\n".join(lines)


def _trial(trial: Mapping[str, Any]) -> list[str]:
    detail = f"largest error {trial['largest_error']:.1e}" if trial["ran"] else trial["reason"]
    works = "yes" if trial["ok"] else "WRONG" if trial["ran"] else "no"
    return [trial["device"], trial["backend"], works, detail]


def _optional(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
    name, about = item
    return name, about["version"] or f"not installed; pip install 'headwater[{about['extra']}]'"


def columns(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of cells as lines with aligned columns; numbers to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(not isinstance(row[i], str) for row in rows[1:]) for i in range(len(widths))]
    place = [str.rjust if to_right else str.ljust for to_right in right]
    lines = (
        "  ".join(put(text, n) for put, text, n in zip(place, row, widths, strict=True)) for row in cells
    )
    return [line.rstrip() for line in lines]


def cell(value: Any) -> str:
    """One value as text: four digits of a fraction; control characters escaped, so that no token drives a terminal."""
    if isinstance(value, float | np.floating):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
    text = str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _array(array: xr.DataArray) -> list[str]:
    """An array without its axes of length one: a value, a list, or one matrix for each index before the last two."""
    fixed = [f"{dim} {_labels(array, dim)[0]}" for dim in map(str, array.dims) if array.sizes[dim] == 1]
    title = " · ".join([str(array.name or "value"), *(text for text in fixed if text != "batch 0")])
    array = array.squeeze()
    if array.ndim == 0:
        return [f"{title}: {cell(array.values[()])}"]
    if array.ndim == 1 and array.size <= MOST_ROWS:
        (dim,) = map(str, array.dims)
        return [title, *columns([[dim, "value"], *zip(_labels(array, dim), array.values, strict=True)])]
    if array.ndim > 1 and array.size <= MOST_ROWS * MOST_COLUMNS and array.shape[-1] <= MOST_COLUMNS:
        return [line for part in _matrices(array) for line in (title, *part)]
    return [f"{title}: the {MOST_ROWS} largest of {array.size} (--json gives all)", *_largest(array)]


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
        found = array[index]
        rows.append([*(_labels(found, str(dim))[0] for dim in array.dims), found.values[()]])
    return columns([[*map(str, array.dims), "value"], *rows])


def _labels(array: xr.DataArray, dim: str) -> list[str]:
    """The coordinate of each place on an axis (or of a single value), with its token where the array carries one."""
    names = array.coords[dim].values if dim in array.coords else np.arange(array.sizes.get(dim, 1))
    tokens = array.coords.get(f"{dim}_token")
    if tokens is None or tokens.dims not in ((dim,), ()):
        return [cell(name) for name in np.atleast_1d(names)]
    pairs = zip(np.atleast_1d(names), np.atleast_1d(tokens.values), strict=True)
    return [f"{cell(name)} {cell(token)}" for name, token in pairs]
