"""Runs that are guided away from a run whose attention is perturbed in some heads: pictures, or the logits of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._measures.measure import Explained
from headwater.analyses._prompts.examples import batches_of, outputs_of
from headwater.analyses.vision._drawings import drawn, is_drawing, measured, pairs_of, part_of
from headwater.lens.edits.base import Edit
from headwater.lens.errors import AnalysisError
from headwater.lens.files import digest_of
from headwater.lens.model import HookedModel
from headwater.lens.recipes.text import soft_perturbation
from headwater.lens.running.branches import Branch, guided

Values = Callable[[list[Edit] | None], np.ndarray]


@dataclass(frozen=True)
class Guided:
    """The measure of each example of the search, and of those that judge it, guided away from some heads.

    `told` says which examples they are, `judged` how those of the search and of the judgement differ.
    """

    model: HookedModel
    search: Values
    judge: Values
    amount: float
    told: Any
    judged: str

    def values(self, heads: Sequence[str] | None, judge: bool) -> np.ndarray:
        """float64 [example]; no heads are the plain run."""
        edits = None if heads is None else soft_perturbation(list(heads), self.amount)
        return (self.judge if judge else self.search)(edits)


def guided_runs(
    model: HookedModel, examples: Any, evaluation: Any, measure: Any, weight: float, amount: float, asked: Any,
    pictures: int, size: int, seed: int,
) -> Guided:  # fmt: skip
    """The runs of a model that draws, or of one that reads."""
    if is_drawing(model):
        return _of_pictures(model, examples, evaluation, measure, weight, amount, pictures, size, seed)
    judged = examples if evaluation is None else evaluation
    of_search = _of_texts(model, examples, measure, weight, asked, size)
    of_judge = of_search if evaluation is None else _of_texts(model, judged, measure, weight, asked, size)
    told = "search examples" if evaluation is None else "other examples"
    given = digest_of([repr(examples), repr(evaluation)])
    return Guided(model, of_search, of_judge, amount, given, told)


def _of_pictures(
    model: Any, examples: Any, evaluation: Any, measure: Any, weight: float, amount: float, pictures: int, size: int,
    seed: int,
) -> Guided:  # fmt: skip
    if measure is None:
        raise AnalysisError(
            "head_hunter of pictures needs measure=, a function (pictures, prompts) → one number for each, from Python"
        )
    view = part_of(model, "head_hunter", crosses=False)
    first = pairs_of(examples, pictures, seed)
    second = pairs_of(examples if evaluation is None else evaluation, pictures, seed + len(first))

    def of(pairs: Any) -> Values:
        def values(edits: list[Edit] | None) -> np.ndarray:
            options = {} if edits is None else {"against": Branch(edits, weight=weight)}
            return measured(measure, drawn(view, pairs, size, **options), pairs)

        return values

    told = [[pair.prompt, pair.seed] for pair in (*first, *second)]
    return Guided(
        view, of(first), of(second), amount, told, "other seeds" if evaluation is None else "other prompts"
    )


def _of_texts(
    model: HookedModel, examples: Any, measure: Any, weight: float, asked: Any, size: int
) -> Values:
    answer, wrong, position = asked
    explained = Explained(model, measure, answer, wrong, position, "log_probability", of_classes=True)
    batches = batches_of(model, examples, size)
    outputs = outputs_of(model)
    plain = [outputs(batch.ids) for batch in batches]
    of_batch = [explained.of(batch, before) for batch, before in zip(batches, plain, strict=True)]

    def values(edits: list[Edit] | None) -> np.ndarray:
        found = np.empty(sum(len(batch.places) for batch in batches))
        for batch, value, before in zip(batches, of_batch, plain, strict=True):
            after = before
            if edits is not None:
                with model.edit(*edits):
                    after = outputs(batch.ids)
            logits: Tensor = guided(before, after, weight if edits is not None else 0.0)
            found[batch.places] = value(logits, torch.arange(len(batch.places))).double().cpu()
        return found

    return values
