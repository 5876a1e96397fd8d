"""The measure under many edits: the same edit at other heads or tokens, and the same edit at other strengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import headwater as hw
from headwater.analyses._prompts.examples import outputs_of
from headwater.dashboard.running.edit_kinds import positions_in, with_strength
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import edits_of
from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.experiments import edits_on_parts
from headwater.lens.models.token_ids import token_id
from headwater.lens.progress import progress
from headwater.lens.prompts import prompt_set

DRAWS = 20  # of random controls
OF_A_SET = 16  # prompts of a set in a sweep
RESAMPLES = 1000
AT = ("keys", "source", "positions")  # tokens that an edit is about; its queries stay


# tokens of prompts that are equally long, and the measure of each
Cases = Sequence[tuple[Any, Sequence[Measure]]]


def measured(model: hw.HookedModel, tokens: Any, measure: Measure, edits: Sequence[dict]) -> float:
    """The measure of a run with edits."""
    return float(each_measured(model, tokens, [measure], edits)[0])


def each_measured(
    model: hw.HookedModel, tokens: Any, measures: Sequence[Measure], edits: Sequence[dict]
) -> np.ndarray:
    """The measure of each row of one run with edits, [row]."""
    with torch.no_grad(), edits_on_parts.editing(model, edits_of(edits)):
        losses = [measure.loss for measure in measures]
        if None in losses:
            return model.loss(tokens).double().cpu().numpy()
        # a masked language model without a mask is measured by its hidden states, not by its logits
        outputs = (model.embeddings if measures[0].kind == "likeness" else outputs_of(model))(tokens)
        rows = [(outputs[n : n + 1], tokens.ids[n : n + 1]) for n in range(len(measures))]
        return np.asarray([-float(loss(*row)[0]) for loss, row in zip(losses, rows, strict=True) if loss])


def heads_in(edits: Sequence[dict]) -> list[str]:
    """The heads that edits name."""
    found: list[str] = []
    for edit in edits:
        for given in (edit.get("heads"), edit.get("factors")):
            given = [given] if isinstance(given, str) and given != "all" else given
            found += [str(each) for each in given] if isinstance(given, list | dict) else []
    return list(dict.fromkeys(found))


def tokens_in(edits: Sequence[dict]) -> list[int]:
    """The positions that edits are about."""
    found = [place for edit in edits for place in positions_in({n: edit.get(n) for n in AT})]
    return sorted(set(found))


def elsewhere(
    edits: Sequence[dict], at: str, heads: Sequence[str], length: int, count: int = DRAWS, seed: int = 0
) -> list[list[dict]]:
    """The same edits at as many random other heads, or tokens, `count` times over; the same seed, the same draws.

    `at` is "heads" or "tokens"; `heads` are all of the model and `length` is the number of tokens. AnalysisError where
    the edits name none, or where there are not as many others.
    """
    rng = random.Random(seed)
    named: list[Any] = heads_in(edits) if at == "heads" else [n % length for n in tokens_in(edits)]
    every: list[Any] = list(heads) if at == "heads" else list(range(length))
    others = [each for each in every if each not in named]
    if not named:
        raise AnalysisError(f"the edits name no {at}, so there are no others to try")
    if len(others) < len(named):
        raise AnalysisError(
            f"the edits name {len(named)} of {len(every)} {at}: there are not as many others to try"
        )
    found = []
    for _ in range(count):
        instead = dict(zip(named, rng.sample(others, len(named)), strict=True))
        found.append([_moved(edit, at, instead, length) for edit in edits])
    return found


def _moved(edit: dict, at: str, instead: dict, length: int) -> dict:
    new = dict(edit)
    if at == "heads":
        if isinstance(edit.get("heads"), str) and edit["heads"] != "all":
            new["heads"] = instead[edit["heads"]]
        elif isinstance(edit.get("heads"), list):
            new["heads"] = [instead[str(head)] for head in edit["heads"]]
        if isinstance(edit.get("factors"), dict):
            new["factors"] = {instead[str(head)]: factor for head, factor in edit["factors"].items()}
        return new
    for name in AT:
        given = edit.get(name)
        if isinstance(given, int) and not isinstance(given, bool):
            new[name] = instead[given % length]
        elif isinstance(given, list):
            new[name] = [instead[n % length] if isinstance(n, int) else n for n in given]
    return new


def controls(
    model: hw.HookedModel, tokens: Any, measure: Measure, tries: Sequence[Sequence[dict]]
) -> np.ndarray:
    """The measure under each of several lists of edits; NaN where a list does not fit."""
    found = []
    for edits in progress(tries, desc="random controls", unit="control"):
        try:
            found.append(measured(model, tokens, measure, edits))
        except HeadwaterError:
            found.append(np.nan)
    return np.asarray(found)


@dataclass(frozen=True)
class Sweep:
    """The measure at strengths; `values` [strength, example], `plain` [example] without the edits.

    `low` and `high` are the ends of a 95 % bootstrap interval of the mean, equal to it for one example.
    """

    strengths: np.ndarray
    values: np.ndarray
    plain: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(1)

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        count = self.values.shape[1]
        if count < 2:
            return self.mean, self.mean
        drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
        means = self.values[:, drawn].mean(-1)
        low, high = np.quantile(means, (0.025, 0.975), axis=1)
        return low, high


def sweep(
    model: hw.HookedModel, cases: Cases, edits: Sequence[dict], place: int, strengths: np.ndarray
) -> Sweep:
    """The measure of each prompt while the edit at `place` takes each strength in turn: a run a case and strength."""
    found = []
    with progress(desc="sweep", unit="run", total=len(cases) * (len(strengths) + 1)) as bar:

        def row(now: Sequence[dict]) -> np.ndarray:
            values = []
            for tokens, measures in cases:
                values.append(each_measured(model, tokens, measures, now))
                bar.update()
            return np.concatenate(values)

        for strength in strengths:
            found.append(
                row([*edits[:place], with_strength(edits[place], float(strength)), *edits[place + 1 :]])
            )
        plain = row([])
    return Sweep(np.asarray(strengths, dtype=float), np.stack(found), plain)


def lengths(model: hw.HookedModel, prompts: Sequence[str]) -> dict[int, list[int]]:
    """The places of prompts by their number of tokens: those that are equally long share their runs."""
    found: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        found.setdefault(int(model.to_tokens(prompt).ids.shape[1]), []).append(place)
    return found


def cases_of(model: hw.HookedModel, name: str, own: bool, measure: Measure, count: int) -> Cases:
    """Prompts of a set with their tokens, each with the measure of its own answer and first distractor.

    `own` draws them as the embedded task models learnt them, otherwise from the words of the model's tokenizer.
    """
    examples = prompt_set(name, count) if own else prompt_set(name, count, model=model)
    prompts, cases = [each.prompt for each in examples], []
    for length, places in lengths(model, prompts).items():
        measures = []
        for example in (examples[place] for place in places):
            answer = token_id(model, example.answer, "answer")
            wrong = token_id(model, example.wrong[0], "wrong") if example.wrong else None
            measures.append(Measure(measure.kind, measure.label, answer, wrong, length - 1, measure.plain))
        cases.append((model.to_tokens([prompts[place] for place in places]), measures))
    return cases
