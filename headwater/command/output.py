"""Results as text for a terminal and as JSON for programs.

A terminal gets tables (`tables.py`); JSON always has every number, with null where one is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
import xarray as xr

from headwater.analyses._catalogue.graph import stability
from headwater.command import tables
from headwater.command.columns import columns
from headwater.dashboard.tables import to_json
from headwater.lens.trained.registry import megabytes

if TYPE_CHECKING:
    from headwater.analyses._catalogue.catalogue import Entry
    from headwater.lens.experiments.run_file import Outcome
    from headwater.lens.records.record import Record

# a column number, a count of queries, and a sum whose mean over keys is the rows' mass: their means say nothing
NO_MEAN = ("argmax", "visible", "received")

GIVEN = {  # what the command line reads for it
    "record": "--record FILE, or what one is made of: prompts, --image, --audio, --decoder",
    "model+examples": "prompts, --image, --audio, --decoder and --label",
    "model+pairs": "the same in pairs that take turns: clean, corrupt",
    "model": "no prompts",
    "circuits": "two files",
}


def as_json(result: Any) -> str:
    """Valid JSON of a result: arrays with their dimensions and coordinates, everything else by its fields."""
    return to_json(_fields(result))


def _fields(content: Any) -> Any:
    if isinstance(content, xr.DataArray | xr.Dataset):
        return content.to_dict()
    if isinstance(content, nx.DiGraph):
        return {**nx.node_link_data(content, edges="links"), "attrs": content.graph}
    if is_dataclass(content):
        shown = [field.name for field in fields(content)]
        return {
            name: _fields(getattr(content, name)) for name in shown if not callable(getattr(content, name))
        }
    return [_fields(value) for value in content] if isinstance(content, list | tuple) else content


def as_text(result: xr.DataArray | xr.Dataset | nx.DiGraph) -> str:
    """What was asked, then the numbers in tables; the last line says what they must not be used for."""
    told = result.graph if isinstance(result, nx.DiGraph) else result.attrs
    lines = [str(told["question"])] if told.get("question") else []
    lines += [f"unit: {told['unit']}"] if told.get("unit") else []
    lines += ["", *(tables.of_graph(result) if isinstance(result, nx.DiGraph) else tables.of(result))]
    ends = {"one token": told.get("one_token"), "set aside": told.get("set_aside")}
    ends |= {"stability": stability(told)}
    ends |= {"not covered by any map": told.get("not_covered"), "not for": told.get("not_for")}
    last = [f"{name}: {text}" for name, text in ends.items() if text]
    return "\n".join([*lines, "", *last] if last else lines)


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
    lines = [told, *columns(table), "means over heads and tokens; --json gives every value"]
    left_out = found.attrs.get("not_covered")
    return "\n".join([*lines, f"not covered by any map: {left_out}"] if left_out else lines)


def outcome(found: Outcome) -> str:
    """What an experiment gave, in means over its prompts, and whether it agrees with the run before."""
    told = found.results
    rows = {
        name: [
            [line[when][name] for line in told.results if isinstance(line.get(when, {}).get(name), float)]
            for when in ("before", "after")
        ]
        for name in told.results[0]["before"]
    }
    means = [
        [name, *(f"{sum(v) / len(v):.6g}" if v else "–" for v in values)] for name, values in rows.items()
    ]
    count = len(told.results)
    lines = [f"{told.model}, {count} prompt{'s' * (count != 1)}; means over prompts of what is one number"]
    lines += columns([["measure", "before", "after"], *means])
    lines += [f"digest {told.digest}"]
    if found.verified is None:
        return "\n".join([*lines, f"results in {found.path}"])
    far = f"largest difference {found.largest:.3g}"
    if found.verified:
        return "\n".join([*lines, f"verified: {found.numbers} values agree with {found.path} ({far})"])
    shown = ", ".join(found.differing[:5]) + (" …" if len(found.differing) > 5 else "")
    return "\n".join([*lines, f"NOT verified against {found.path}: {shown} ({far})"])


def models(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The embedded models, those that were added and those that can be, one on a line."""
    rows = ([name, _state(about), about["description"]] for name, about in found.items())
    more = "headwater models add NAME fetches one, headwater models rm NAME removes it"
    return "\n".join([*columns([["name", "state", "what it is"], *rows]), "", more])


def _state(about: Mapping[str, Any]) -> str:
    if about["state"] == "embedded":
        return "embedded"
    disk, fetched = megabytes(about["bytes"]), megabytes(about["download_bytes"])
    if about["state"] == "added":
        return f"added, {disk}"
    return f"can be added: {fetched} to fetch, {disk} on disk, {about['licence']}"


def entry(found: Entry) -> str:
    """One analysis in full: question, settings, formula, cost, source, limits."""
    table = [["--set", "default", "kind", "meaning"]]
    for each in found.settings:
        default = "must be given" if each.required else each.default
        if isinstance(default, tuple | list):
            default = ",".join(map(str, default))
        table.append(
            [
                each.name,
                "none" if default is None else str(default),
                "|".join(each.choices) or f"{each.kind}{each.bounds}",
                each.help,
            ]
        )
    facts = [f"unit: {found.unit}", f"inputs: {found.inputs}: {GIVEN[found.inputs]}"]
    facts += [f"{word}: {getattr(found, word)}" for word in ("cost", "paper")]
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
        "attention of the forward pass on `auto`:",
        *columns(
            [["device", "problem", "backend", "because"]]
            + [[c["device"], c["problem"], c["backend"], c["reason"]] for c in found["choices"]]
        ),
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
