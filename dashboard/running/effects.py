"""What each head does to the measure: without it, by its slope, by what it writes itself; on a text or on a prompt set.

Every effect is signed: above 0 where the head helps the measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st
import torch
import xarray as xr
from torch import Tensor

import headwater as hw
from headwater.analyses._catalogue.catalogue import entry
from headwater.analyses._measures.bootstrap import intervals
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run
from headwater.lens.errors import AnalysisError, PromptError
from headwater.lens.models.embedded import embedded
from headwater.lens.models.token_ids import token_id
from headwater.lens.prompts import prompt_set, prompt_sets

EXAMPLES, DRAWS = 16, 1000
OF_ANSWERS = ("difference", "log_probability", "probability")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Asked:
    """Examples with the loss whose rise is the fall of the measure, and the settings that name their answers."""

    examples: Any
    count: int
    loss: Loss | None
    answers: dict[str, Any]


def of_prompt(run: Run, measure: Measure) -> Asked:
    """The input of a run alone."""
    own = measure.at(run.position)
    answers = own.fitting(entry("direct_logit_attribution")) if own.answer is not None else {}
    return Asked(run.example, 1, own.loss, answers)


def sets_of(model: hw.HookedModel) -> list[str]:
    """The prompt sets that a causal model of texts can be judged on."""
    if not (model.causal and model.has_lm_head) or model.is_encoder_decoder or model.tokenizer is None:
        return []
    return list(prompt_sets() if model.name in embedded() else prompt_sets(model.tokenizer))


@st.cache_data(max_entries=64, show_spinner=False)
def set_of(name: str, text: str, _model: hw.HookedModel) -> str | None:
    """The prompt set of the model `name` that a text is an example of."""
    for each in sets_of(_model):
        with suppress(PromptError):  # words of a set that the tokenizer splits
            if text in {example.prompt for example in _drawn(_model, each, EXAMPLES)}:
                return each
    return None


def of_set(model: hw.HookedModel, name: str, measure: Measure) -> Asked:
    """The examples of a prompt set, each with its own answer and its own wrong answer."""
    if measure.kind not in OF_ANSWERS:
        raise AnalysisError("a prompt set is judged by its answers; choose a measure of an answer")
    drawn = {each.prompt: each for each in _drawn(model, name, EXAMPLES)}
    answers = [token_id(model, each.answer, "answer") for each in drawn.values()]
    wrong = [token_id(model, each.wrong[0], "wrong") for each in drawn.values()]
    rows = [tuple(model.to_tokens(prompt).ids[0].tolist()) for prompt in drawn]
    of = dict(zip(rows, zip(answers, wrong, strict=True), strict=True))
    kind = measure.kind

    def negated(outputs: Tensor, ids: Tensor) -> Tensor:
        known = outputs[:, -1].double().log_softmax(-1)
        row = torch.arange(len(known))
        own = torch.tensor([of[tuple(each)] for each in ids.tolist()])
        found = known[row, own[:, 0]]
        if kind == "difference":
            found = found - known[row, own[:, 1]]
        return -(found.exp() if kind == "probability" else found)

    named: dict[str, Any] = {"answer": answers} | ({"wrong": wrong} if kind == "difference" else {})
    return Asked(list(drawn), len(drawn), negated, named)


def _drawn(model: hw.HookedModel, name: str, count: int) -> Sequence[Any]:
    return prompt_set(name, count, model=None if model.name in embedded() else model)


def effect(model: hw.HookedModel, how: str, asked: Asked) -> xr.Dataset:
    """`effect`, `low`, `high` [layer, head] of one way: "ablation", "mean", "gradient" or "direct".

    The bounds hold 95 % of the means over resampled examples; of one example they are NaN.
    """
    importance = entry("head_importance").function
    if how == "direct":
        function = entry("direct_logit_attribution").function
        found = function(model, asked.examples, unit="head", **asked.answers)
    elif how == "gradient":
        found = importance(model, asked.examples, loss=asked.loss, per_example=True, signed=True)
    else:
        ablation = "mean" if how == "mean" else "zero"
        found = importance(
            model, asked.examples, how="ablation", loss=asked.loss, ablation=ablation, per_example=True
        )
    rows = found.transpose("batch", "layer", "head")
    bounds = intervals(rows.values, ("layer", "head"), DRAWS, 0, ("effect", "low", "high"))
    places = {"layer": rows["layer"].values, "head": rows["head"].values}
    return xr.Dataset(bounds, places, {"examples": asked.count})


def pruned(model: hw.HookedModel, asked: Asked, controls: int = 20) -> xr.Dataset:
    """The measure while heads go, those that help it least first, and in random orders: `prune_heads`."""
    loss = asked.loss

    def measured(outputs: Tensor) -> Tensor:
        assert loss is not None
        return -loss(outputs, torch.empty(0))

    return entry("prune_heads").function(
        model, asked.examples, measure=None if loss is None else measured, loss=loss, importance="ablation",
        normalise=None, unit="head", controls=controls,
    )  # fmt: skip


def agreement(columns: dict[str, np.ndarray]) -> xr.DataArray:
    """Spearman's rank correlation of each two columns of numbers per head, [one, other]; NaN where one has no order, as
    its numbers are all the same."""
    names = list(columns)
    ranks = [_ranks(columns[name].ravel()) for name in names]
    ordered = [n for n, each in enumerate(ranks) if np.ptp(each)]
    found = np.full((len(names), len(names)), np.nan)
    if ordered:
        found[np.ix_(ordered, ordered)] = np.corrcoef(np.stack([ranks[n] for n in ordered]))
    return xr.DataArray(found, {"one": names, "other": names}, ("one", "other"))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, with their mean where values are equal."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[which]
