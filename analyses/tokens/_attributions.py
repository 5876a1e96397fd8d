"""Token weights of a prediction by the name of a method, so that methods can be compared on the same texts.

Methods of a record give the row of the position that predicts; methods of a model are asked about the same prediction.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._measures.measure import Explained
from headwater.analyses._prompts.examples import Batch
from headwater.analyses._prompts.texts import Texts
from headwater.lens.errors import AnalysisError, nearest
from headwater.lens.model import HookedModel

OF_RECORD = ("raw_attention", "rollout", "flow")
BY_QUERY = ("norms", "globenc", "alti", "value_zeroing")
EXPLAINED_BY_QUERY = ("relevance", "gradient_rollout")
EXPLAINED = ("blank_out", "input_gradient", "input_x_gradient", "integrated_gradients")
METHODS = (*OF_RECORD, *BY_QUERY, *EXPLAINED_BY_QUERY, *EXPLAINED)
Methods = str | Sequence[str]


def named(methods: Methods) -> list[str]:
    """Names of methods from a list or a text such as "rollout flow"; an error for one that is unknown."""
    names = methods.replace(",", " ").split() if isinstance(methods, str) else list(methods)
    if not names:
        raise AnalysisError("no method is named; give one or more, e.g. rollout")
    for name in names:
        if name not in METHODS:
            raise AnalysisError(f"no method is called {name!r}; {nearest(name, METHODS)}")
    if len(set(names)) < len(names):
        raise AnalysisError("a method is named twice; name each once")
    return names


def token_weights(model: HookedModel, batch: Batch, method: str, asked: Explained) -> Tensor:
    """Weight of each token of the texts of a batch by a method with its default settings: float64 [text, token]."""
    function: Callable[..., Any] = getattr(
        importlib.import_module(f"headwater.analyses.tokens.{method}"), method
    )
    if method in OF_RECORD:
        found = function(model.record(batch.ids, statistics=("row_mass",)), queries=[asked.position])
    elif method in BY_QUERY:
        found = function(model, batch.ids, queries=[asked.position])
    else:
        rows = {"queries": [asked.position]} if method in EXPLAINED_BY_QUERY else {}
        # an answer belongs to a text of all examples; a batch holds some of them, in an order of its own
        answers = (
            {name: asked.ids_of(name, batch) for name in ("answer", "wrong")} if not asked.measure else {}
        )
        about = {"measure": asked.measure, "kind": asked.kind, "position": asked.position}
        found = function(model, batch.ids, **rows, **about, **answers)
    if method == "norms":  # a map per layer: the last one's row
        found = found["norm"].isel(layer=-1)
    values = np.asarray(found.values, dtype=np.float64)
    return torch.from_numpy(values[:, 0] if values.ndim == 3 else values)


Given = Mapping[
    str, Any
]  # name → weights of one's own [batch, token], NaN (or cut off) where a text has no token


def weights_by_method(
    model: HookedModel, texts: Texts, methods: Methods | Given, asked: Explained
) -> dict[str, list[np.ndarray]]:
    """Token weights of each text by each method, without padding."""
    if not isinstance(methods, Mapping):
        found = {name: texts.empty() for name in named(methods)}
        for batch in texts.batches:
            for name, rows in found.items():
                texts.spread(batch, token_weights(model, batch, name, asked), rows)
        return {name: _cut(name, rows.numpy(), texts) for name, rows in found.items()}
    if not methods:
        raise AnalysisError("methods is empty; give weights [batch, token] by name")
    return {
        str(name): _cut(str(name), np.asarray(given, np.float64), texts) for name, given in methods.items()
    }


def _cut(name: str, rows: np.ndarray, texts: Texts) -> list[np.ndarray]:
    valid = texts.valid.numpy()
    if rows.shape != valid.shape:
        raise AnalysisError(f"{name}: weights must be [batch, token] = {valid.shape}, got {rows.shape}")
    found = [row[real] for row, real in zip(rows, valid, strict=True)]
    for place, row in enumerate(found):
        if not np.isfinite(row).all():
            raise AnalysisError(
                f"{name} has no weight for token {int(np.argmin(np.isfinite(row)))} of text {place}"
            )
    return found
