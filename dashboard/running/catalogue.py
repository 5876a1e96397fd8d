"""An analysis of the catalogue on what a page looks at: its settings from text, its inputs, its numbers as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import streamlit as st
import torch
import xarray as xr

import headwater as hw
from headwater.analyses._catalogue.about import Listed, listed, room_questions
from headwater.analyses._catalogue.catalogue import Entry
from headwater.analyses._catalogue.settings import Setting
from headwater.dashboard.running import picture, runs
from headwater.dashboard.running.jobs import quick
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.pairs import Corrupt
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State
from headwater.dashboard.tables import extremes
from headwater.lens.errors import AnalysisError, HeadwaterError

BETWEEN = " | "  # several texts in a line
CIRCUIT = ("pairs", "graph")  # second parameters that take clean and corrupt prompts as one list of pairs


def by_question(search: str = "", of_record: bool = False) -> dict[str, list[Listed]]:
    """The analyses in which every word of the search stands, under the questions of their rooms; `of_record`: those
    that need a record alone."""
    words = search.lower().split()
    found = {}
    for room, question in room_questions().items():
        rows = []
        for each in listed().values():
            said = " ".join(
                (each.name.replace("_", " "), each.name, each.question, each.unit, each.paper, question)
            )
            if (
                each.room == room
                and all(word in said.lower() for word in words)
                and (not of_record or each.inputs == "record")
            ):
                rows.append(each)
        if rows:
            found[question] = rows
    return found


def fields(entry: Entry) -> list[Setting]:
    """The settings that a page asks for: without those that name a file, which the dashboard does not open; where a
    list of texts stands for the file, that is asked for."""
    return [setting for setting in entry.settings if setting.lists_texts or not setting.opens]


def as_text(value: Any) -> str:
    """A value as it is typed: "0 -1" for a list; nothing for none."""
    if value is None or not isinstance(value, (str, int, float, list, tuple)):
        return ""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def typed(entry: Entry, values: Mapping[str, Any]) -> dict[str, Any]:
    """What would stand in the fields of a form for these values of settings, and for the defaults of the rest."""
    every = {setting.name: values.get(setting.name, setting.default) for setting in fields(entry)}
    texts = {setting.name for setting in fields(entry) if setting.opens}
    return {
        name: value
        if isinstance(value, bool | int | float)
        else BETWEEN.join(map(str, value))
        if name in texts and isinstance(value, list | tuple)
        else as_text(value)
        for name, value in every.items()
    }


def of_measure(entry: Entry, chosen: Measure, run: Run) -> dict[str, Any]:
    """What the page's measure says of answer, distractor, position and kind; nothing where it is of no answer
    that the run has."""
    found: dict[str, Any] = {}
    with suppress(AnalysisError):
        for name, value in chosen.of_run(run).fitting(entry).items():
            with suppress(
                AnalysisError
            ):  # as a position from the left where only those from the right are taken
                found[name] = entry.setting(name).check(value)
    return found


def read(entry: Entry, typed: Mapping[str, Any], filled: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a call from what was typed; those at their defaults are left out. AnalysisError for a wrong one."""
    found: dict[str, Any] = {}
    for setting in fields(entry):
        value = typed.get(setting.name)
        if isinstance(value, str):
            if setting.name not in filled and not setting.required and value == as_text(setting.default):
                continue
            if setting.required and not value.strip():
                raise AnalysisError(f"{setting.name} is missing: {setting.help or 'it has no default'}")
            value = setting.parse(value)
            if setting.opens and isinstance(value, str):  # a text alone could name a file
                value = [text.strip() for text in value.split(BETWEEN.strip())]
        elif value is not None:
            value = setting.check(value)
        if setting.name in filled or setting.required or value != setting.default:
            found[setting.name] = value
    return found


def takes_loss(entry: Entry) -> bool:
    """Whether it can be of the page's measure as a loss."""
    return "loss" in entry.function.__annotations__


def key_of(
    entry: Entry, settings: Mapping[str, Any], run: Run, chosen: Measure, corrupt: Corrupt | None
) -> tuple:
    """What tells a result from all others."""
    return (
        "catalogue", entry.name, settings_text(settings), *run.identity, *chosen.key, corrupt.key if corrupt else None
    )  # fmt: skip


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as JSON, as a pin holds them."""
    return json.dumps(settings, sort_keys=True, default=str)


def ask(
    state: State, run: Run, chosen: Measure, entry: Entry, given: Mapping[str, Any], corrupt: Any = None
) -> Any:
    """The result on the run's input, with the run's edits in force."""
    settings = dict(given)
    if run.of_record and entry.inputs == "record":
        return entry.function(run.record, **settings)
    model = runs.model_of(state, run)
    if takes_loss(entry) and (loss := chosen.of_run(run).loss) is not None:
        settings["loss"] = loss
    with runs.editing(run):
        if entry.inputs == "record":
            return entry.function(_record(model, run, entry, settings), **settings)
        if entry.inputs == "model":
            return entry.function(model, **settings)
        if entry.inputs == "model+pairs":
            return entry.function(model, *_pairs(entry, run.example, corrupt), **settings)
        if entry.inputs == "model+examples":
            return entry.function(model, [run.example], **settings)
    raise AnalysisError(
        f"{entry.name} compares files of circuits; two circuits are compared on the page Circuits"
    )


def _record(model: hw.HookedModel, run: Run, entry: Entry, settings: Mapping[str, Any]) -> hw.Record:
    """The run's record, or one that keeps what the analysis needs."""
    if set(entry.keep) <= {"qk"}:
        return run.record
    more = ("mixers",) if settings.get("mixers") == "effective" else ()
    return model.record(run.example, keep=(*entry.keep, *more))


def _pairs(entry: Entry, clean: Any, corrupt: Any) -> tuple[Any, ...]:
    second = list(entry.function.__annotations__)[1]
    if second not in CIRCUIT:
        return clean, corrupt
    return ([(clean, corrupt)],) if second == "pairs" else (None, [(clean, corrupt)])


def passes(entry: Entry, run: Run) -> int | None:
    """How many forward passes it takes, where its cost says so in words that can be counted."""
    if entry.cost.startswith(("layers × heads passes", "2 × layers × heads")):
        return len(run.layers) * run.n_heads * (2 if entry.cost.startswith("2") else 1)
    if entry.cost.startswith(("one forward pass per token", "as many passes as a text has tokens")):
        return len(run.queries)
    return 1 if entry.cost.startswith(("one forward pass", "one forward and backward pass")) else None


@st.cache_data(max_entries=200, show_spinner=False)
def seconds_of_a_pass(name: str, key: tuple, _run: Run) -> float:
    """How long one forward pass on the input takes here."""
    model = runs.resident(name)
    with quick(name), torch.no_grad():
        tokens = model.to_tokens(_run.example)
        begun = time.monotonic()
        model(tokens)
        return time.monotonic() - begun


def table(result: Any) -> pd.DataFrame:
    """The numbers of a result, one per line with its coordinates; of a graph the edges."""
    if isinstance(result, nx.Graph):
        return pd.DataFrame([{"from": u, "to": v, **about} for u, v, about in result.edges(data=True)])
    if isinstance(result, xr.DataArray):
        return _lines(result, None)
    if isinstance(result, (xr.Dataset, dict)):
        rows = [_lines(each, str(name)) for name, each in result.items() if isinstance(each, xr.DataArray)]
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
    if isinstance(result, pd.DataFrame):
        return result.reset_index()
    return pd.DataFrame({"result": [str(result)]})


def _lines(array: xr.DataArray, name: str | None) -> pd.DataFrame:
    if array.ndim == 0:
        frame = pd.DataFrame({"value": [array.values.item()]})
    else:
        frame = array.rename("value").to_dataframe().reset_index()
        frame = pd.DataFrame(frame[[*(column for column in frame if column != "value"), "value"]])
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:  # words in a column of their own
        frame = frame.rename(columns={"value": "text"})
    if name is not None:
        frame.insert(0, "variable", name)
    return frame


def seen(frame: pd.DataFrame) -> str:
    """What a table says, in words: its largest numbers, or how many lines it has."""
    name = next((each for each in ("value", "score", "weight") if each in frame), None)
    return f"{len(frame)} lines" if name is None else extremes(frame, name)


def is_known(name: object) -> bool:
    return isinstance(name, str) and name in listed()


def pins_of(given: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pinned results of a state: names of analyses and their settings; what does not fit is left out."""
    for each in given:
        about = each if isinstance(each, dict) else {}
        if is_known(about.get("analysis")) and isinstance(about.get("settings"), dict):
            yield about["analysis"], about["settings"]


def figure_of(result: Any, run: Run) -> Any:
    """The figure of a result, over the picture where it is of patches. HeadwaterError for what has none."""
    image = picture.pixels(run) if picture.grid(run) else None
    if image is not None and isinstance(result, xr.DataArray):
        with suppress(HeadwaterError):
            return hw.figure(result, image=image)
    return hw.figure(result)
