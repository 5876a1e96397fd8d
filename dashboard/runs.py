"""The model that is resident and what it says of a prompt, before and after edits.

One model that reads texts and one that sees are held for all sessions, and nobody changes them: edits travel with the
call that runs under them. Results are kept by their content (model, prompt, edits), so two sessions that ask the same
thing share the answer and no session sees another's edits. One forward pass runs at a time, which bounds memory, not
correctness.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import torch

import headwater as hw
from headwater.lens.edits.patterns import named_files
from headwater.lens.errors import EditError, HeadwaterError, ModelError
from headwater.lens.models.embedded import embedded
from headwater.lens.trained.registry import TRAINED, is_added

STATISTICS = ("lse", "entropy", "max", "self", "previous", "first", "distance", "received", "visible")
FIRST_MODEL, FALLBACK = "smollm2-135m", "tasks-4l"
_given: dict[str, str] = {}
_turn = threading.Lock()


@dataclass(frozen=True)
class Run:
    """What a run over a prompt gives.

    ``probabilities`` are those of the next token; they are empty for a model that predicts none, and then ``hidden``
    holds its last hidden states. ``loss`` is None where there is no next token to compare with.
    """

    record: hw.Record
    tokens: list[str]
    probabilities: np.ndarray
    loss: float | None
    hidden: np.ndarray

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def predicts(self) -> bool:
        return self.probabilities.size > 0


def allow(model: str | None) -> list[str]:
    """Offer ``model`` besides the embedded and added ones; gives the names offered, the one to be shown first.

    A folder is offered under its own name, so that no path stands in an address.
    """
    if model:
        folder = Path(model).expanduser()
        _given[folder.resolve().name if folder.is_dir() else model] = model
    return offered()


def offered() -> list[str]:
    added = [name for name, each in TRAINED.items() if each.reads == "text" and is_added(name)]
    shipped = [name for name, each in embedded().items() if each["reads"] == "text"]
    known = [*added, *sorted(shipped, key=lambda name: (name != FALLBACK, name))]
    names = list(dict.fromkeys([*reversed(_given), *known]))
    if not names:
        raise ModelError(
            "no model is embedded and none is given: headwater dashboard MODEL opens a folder or a hub id"
        )
    return names


def given() -> list[str]:
    """The names of the models that were given by the user."""
    return list(_given)


def open_first() -> None:
    """Load what is shown where no model was named: a trained one, or, said in a line, one that comes with Headwater."""
    try:
        resident(FIRST_MODEL)
    except HeadwaterError as error:
        print(f"{error}. The dashboard opens on {FALLBACK}.", file=sys.stderr, flush=True)
        resident(allow(FALLBACK)[0])


def source(name: str) -> str:
    """What ``headwater.load`` takes for a model offered as ``name``."""
    return _given.get(name, name)


@st.cache_resource(max_entries=2, show_spinner=False)  # one that reads texts, one that sees
def resident(name: str) -> hw.HookedModel:
    return hw.load(source(name))


def alone(work: Callable[[], Any]) -> Any:
    """Do work on the model when no other session is at it."""
    with _turn:
        return work()


def edits_of(edits: Sequence[dict]) -> list:
    """Edits from data, such as an address, which may not name files: it could open them, or tell which there are."""
    for edit in edits:
        if named_files(edit):
            raise EditError(
                f"{edit.get('edit')} names the file of a record, which the dashboard does not open; run it with "
                "headwater record --edits"
            )
    return [hw.edit_from_dict(edit) for edit in edits]


def base_run(name: str, prompt: str) -> Run:
    return _run(name, prompt, "[]")


def edited_run(name: str, prompt: str, edits: Sequence[dict]) -> Run:
    return _run(name, prompt, json.dumps(edits, sort_keys=True))


@st.cache_resource(max_entries=6, show_spinner="Running the model …", show_time=True)
def _run(name: str, prompt: str, edits: str) -> Run:
    model = resident(name)
    with _turn, torch.no_grad(), model.edit(*edits_of(json.loads(edits))):
        tokens = model.to_tokens(prompt)
        record = _recorded(model, tokens)
        probabilities, loss, hidden = np.empty(0), None, np.empty(0)
        if model.has_lm_head and model.causal:
            probabilities = torch.softmax(model(tokens)[0, -1].double(), dim=-1).numpy()
            loss = float(model.loss(tokens)[0]) if tokens.ids.shape[1] > 1 else None
        else:
            hidden = model.embeddings(tokens)[0].double().numpy()
    return Run(record, record.strings[0], probabilities, loss, hidden)


def _recorded(model: hw.HookedModel, tokens: Any) -> hw.Record:
    """The record, with the exact maps of layers without softmax attention where these can be read."""
    if model.mixers:
        try:
            return model.record(tokens, statistics=STATISTICS, keep=("qk", "mixers"))
        except ModelError:  # of a kind without a map, which the analyses that need one then say
            pass
    return model.record(tokens, statistics=STATISTICS)


def next_tokens(name: str, before: Run, after: Run | None = None, count: int = 10) -> pd.DataFrame:
    """The likeliest next tokens before and, where given, after: token, id and probabilities."""
    ranked = np.argsort(-before.probabilities, kind="stable")[:count]
    if after is not None:
        ranked = np.concatenate([ranked, np.argsort(-after.probabilities, kind="stable")[:count]])
        _, first = np.unique(ranked, return_index=True)
        ranked = ranked[np.sort(first)]
    frame = pd.DataFrame(
        {
            "token": resident(name).to_strings(torch.as_tensor(ranked)),
            "id": ranked,
            "probability": before.probabilities[ranked],
        }
    )
    if after is not None:
        frame = frame.rename(columns={"probability": "before"})
        frame["after"] = after.probabilities[ranked]
        frame["change"] = frame["after"] - frame["before"]
    return frame


def pattern(
    run: Run, layer: int, head: int, queries: slice | None = None, keys: slice | None = None
) -> np.ndarray:
    """Exact weights of one map or of a window of it, [query, key]."""
    return run.record.pattern(layer, head, queries=queries, keys=keys)[0].numpy()


def rows(run: Run, layer: int, head: int, queries: slice, keys: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """The same window as blocks of rows, for maps too large to hold; slices count from the window's first query."""
    for where, weights in run.record.map(layer).row_blocks(heads=[head]):
        first, last = max(where.start, queries.start), min(where.stop, queries.stop)
        if first < last:
            block = weights[0, 0, first - where.start : last - where.start, keys]
            yield slice(first - queries.start, last - queries.start), block.numpy()


def similarity(before: Run, after: Run) -> float:
    """Mean cosine between the last hidden states of two runs of a model without a language head."""
    dot = (before.hidden * after.hidden).sum(-1)
    return float(
        (dot / np.linalg.norm(before.hidden, axis=-1) / np.linalg.norm(after.hidden, axis=-1)).mean()
    )
