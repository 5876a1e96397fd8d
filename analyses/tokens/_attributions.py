"""Token weights of a prediction by attribution methods that are chosen by name, so that they can be compared.

A method of a record gives the row of the position that predicts. A method of a model explains the prediction there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._inputs.entrances import sides_of
from headwater.analyses._inputs.inputs import Inputs
from headwater.analyses._measures.measure import Explained
from headwater.analyses._prompts.examples import Batch
from headwater.analyses.tokens._gradients import predicting
from headwater.analyses.tokens._sinks_aside import Without
from headwater.lens.attention import backward_rules
from headwater.lens.errors import AnalysisError, nearest
from headwater.lens.model import HookedModel

OF_RECORD = ("raw_attention", "rollout", "flow")
BY_QUERY = ("norms", "globenc", "alti", "value_zeroing")
EXPLAINED_BY_QUERY = ("relevance", "gradient_rollout")
RULES = tuple(backward_rules.RULES)  # input_x_gradient with a rule in the place of the gradient
EXPLAINED = ("blank_out", "input_gradient", "input_x_gradient", "integrated_gradients", *RULES)
WITHOUT = ("rollout", "flow")  # that can set sinks aside
METHODS = (*OF_RECORD, *BY_QUERY, *EXPLAINED_BY_QUERY, *EXPLAINED)
BOTH_SIDES = (
    *OF_RECORD,
    "alti",
    "relevance",
    *EXPLAINED,
)  # that weigh an encoder's tokens beside the decoder's
Methods = str | Sequence[str]


def named(methods: Methods) -> list[str]:
    """The methods in a list or in a text such as "rollout flow". AnalysisError where one is unknown or named twice."""
    names = methods.replace(",", " ").split() if isinstance(methods, str) else list(methods)
    if not names:
        raise AnalysisError("no method is named; give one or more, e.g. rollout")
    for name in names:
        if name not in METHODS:
            raise AnalysisError(f"no method is called {name!r}; {nearest(name, METHODS)}")
    if len(set(names)) < len(names):
        raise AnalysisError("a method is named twice; name each once")
    return names


def token_weights(
    model: HookedModel, batch: Batch, method: str, asked: Explained, without: Without = None
) -> Tensor:
    """Weights of the tokens of a batch by one method with its default settings, float64 [text, token].

    Methods that can set sinks aside take `without`. Of an encoder–decoder the encoder's tokens come first.
    """
    name = "input_x_gradient" if method in RULES else method
    function: Callable[..., Any] = getattr(importlib.import_module(f"headwater.analyses.tokens.{name}"), name)
    reads_row = method not in EXPLAINED
    row = _row(asked, batch, method) if reads_row else 0
    if method in OF_RECORD:
        more = {"without": without} if method in WITHOUT else {}
        record = sides_of(model)[-1].record(batch.ids, statistics=("row_mass",))
        found = function(record, queries=[row], **more)
        if method == "raw_attention" and len(sides_of(model)) > 1:  # the rows of both, side by side
            across = function(record.part("cross"), queries=[row])
            return torch.from_numpy(np.concatenate([across.values, found.values], -1)[:, 0]).double()
    elif method in BY_QUERY:
        found = function(model, batch.ids, queries=[row])
    else:
        rows = {"queries": [row]} if method in EXPLAINED_BY_QUERY else {}
        rows |= {"rule": method} if method in RULES else {}
        about = {"measure": asked.measure, "kind": asked.kind, "position": asked.position}
        if not asked.measure:  # the batch holds some of the texts, in its own order, so it gets their answers
            about |= {name: asked.ids_of(name, batch) for name in ("answer", "wrong")}
        found = function(model, batch.ids, **rows, **about)
    if method == "norms":  # one map per layer: take the last layer
        found = found["norm"].isel(layer=-1)
    values = np.asarray(found.values, dtype=np.float64)
    return torch.from_numpy(values[:, 0] if values.ndim == 3 else values)


def _row(asked: Explained, batch: Batch, method: str) -> int:
    """The row that predicts. AnalysisError where there are several, so that a method of rows has no one answer."""
    try:
        return predicting(asked, [batch])
    except AnalysisError as error:
        told = str(error).partition("; name the rows")
        if not told[1]:
            raise
        raise AnalysisError(
            f"{told[0]}, and {method} gives a row for each; take methods without rows ({', '.join(EXPLAINED)})"
        ) from None


# name → the caller's weights [batch, token]; NaN, or any number, on padding
Given = Mapping[str, Any]


def weights_by_method(
    model: HookedModel, inputs: Inputs, methods: Methods | Given, asked: Explained, without: Without = None
) -> dict[str, list[np.ndarray]]:
    """Weights of the input tokens of each text by each method, without padding, class and register tokens."""
    known = () if isinstance(methods, Mapping) else named(methods)
    if without is not None and not set(known) & set(WITHOUT):
        raise AnalysisError(f"without={without!r} is for {' and '.join(WITHOUT)}, and methods names neither")
    if not isinstance(methods, Mapping):
        return {name: _cut(name, _weights(inputs, name, asked, without), inputs) for name in known}
    if not methods:
        raise AnalysisError("methods is empty; give weights [batch, token] by name")
    return {
        str(name): _cut(str(name), np.asarray(given, np.float64), inputs) for name, given in methods.items()
    }


def _weights(inputs: Inputs, name: str, asked: Explained, without: Without) -> np.ndarray:
    """Weights of all tokens by one method, [batch, key]."""
    found = inputs.empty()
    for batch in inputs.batches:
        weights = token_weights(inputs.model, batch, name, asked, without)
        widths = [len(each.places) for each in inputs.entrances(batch)]
        if weights.shape[1] != sum(widths):
            names = " and the ".join(side.part_name for side in inputs.sides)
            raise AnalysisError(
                f"{name} weighs the tokens of one side alone, and a prediction of {inputs.model.name} is computed from "
                f"the {names}; take methods that weigh both ({', '.join(BOTH_SIDES)})"
            )
        mine = weights.split(widths, 1)
        for texts, values, rows in zip(inputs.texts, mine, found, strict=True):
            texts.spread(batch, values, rows)
    return torch.cat(found, 1).numpy()


def _cut(name: str, rows: np.ndarray, inputs: Inputs) -> list[np.ndarray]:
    entered = inputs.entered.numpy()
    if rows.shape != entered.shape:
        raise AnalysisError(f"{name}: weights must be [batch, token] = {entered.shape}, got {rows.shape}")
    found = [row[real] for row, real in zip(rows, entered, strict=True)]
    for place, row in enumerate(found):
        if not np.isfinite(row).all():
            raise AnalysisError(
                f"{name} has no weight for token {int(np.argmin(np.isfinite(row)))} of text {place}"
            )
    return found
