"""The one stated quantity: what every importance, flow, edit, sweep and circuit on every page is of.

It is the log-probability of the answer less that of a distractor, where the model gives tokens or classes: of run A the
likeliest and the next likeliest, unless others are chosen. Otherwise it is the loss, the similarity of a text and its
picture, or the likeness of the last hidden states to those of the plain run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State
from headwater.lens.errors import AnalysisError

KINDS = {
    "difference": "log p(answer) − log p(distractor)",
    "log_probability": "log p(answer)",
    "probability": "p(answer)",
    "loss": "mean loss of the text's own tokens",
    "match": "similarity of the text and the picture",
    "likeness": "likeness to the plain run",
    "none": "nothing: a record holds no answer",
}
UNITS = {"probability": "", "match": "", "likeness": "cosine", "none": ""}  # the others are in nats


@dataclass(frozen=True)
class Measure:
    """`answer` and `wrong` are ids of tokens or classes; `better` is +1 where more is better, −1 for a loss."""

    kind: str
    label: str
    answer: int | None
    wrong: int | None
    position: int | None
    plain: Run

    @property
    def unit(self) -> str:
        return UNITS.get(self.kind, "nats")

    @property
    def better(self) -> int:
        return -1 if self.kind == "loss" else 1

    def at(self, position: int | None) -> Measure:
        """The same of the prediction at another position, such as that of a run with another text."""
        return replace(self, position=position)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others: its label does not, since tokens are cut there."""
        return self.kind, self.answer, self.wrong, self.position, self.plain.name, self.plain.key

    def answered_by(self, run: Run) -> bool:
        """Whether the answer and the distractor are the same tokens or classes in another run."""
        if self.answer is None or run.logits.shape != self.plain.logits.shape or not run.logits.size:
            return False
        named = [number for number in (self.answer, self.wrong) if number is not None]
        return run.name == self.plain.name or all(run.label(n) == self.plain.label(n) for n in named)

    def of_run(self, run: Run) -> Measure:
        """The same of the prediction of a run. AnalysisError where that has other answers."""
        if self.answer is not None and not self.answered_by(run):
            raise AnalysisError(
                f"{run.name} has other answers than the measure; show run A, or choose another model"
            )
        return self.at(run.position)

    def value(self, run: Run) -> float | None:
        """The measure of a run; None where it has none, such as a run of another kind of model."""
        if self.kind == "loss":
            return run.loss
        if self.kind == "match":
            return run.similarity
        if self.kind == "likeness":
            one, other = self.plain.hidden, run.hidden
            return _cosine(one, other) if one.shape == other.shape and one.size else None
        if not self.answered_by(run):
            return None
        known = run.log_probabilities()
        if self.kind == "difference" and self.wrong is not None:
            return float(known[self.answer] - known[self.wrong])
        return float(np.exp(known[self.answer]) if self.kind == "probability" else known[self.answer])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings answer, wrong, kind and position of analyses that explain an output.

        AnalysisError for the loss and for measures that are not of an answer.
        """
        if self.answer is None:
            if self.kind == "match":
                return {}
            raise AnalysisError(
                f"this analysis explains an answer, and the measure is {KINDS[self.kind]}; choose another measure"
            )
        labels = self.plain.labels
        name = (lambda n: labels[n]) if labels else (lambda n: f"#{n}")
        found: dict[str, Any] = {"answer": name(self.answer)}
        if self.kind == "difference" and self.wrong is not None:
            found["wrong"] = name(self.wrong)
        found["kind"] = "probability" if self.kind == "probability" else "log_probability"
        if self.position is not None:
            found["position"] = self.position
        return found

    def fitting(self, entry: Any) -> dict[str, Any]:
        """Those of the settings that an analysis of the catalogue takes."""
        names = {setting.name for setting in entry.settings}
        return (
            {name: value for name, value in self.settings.items() if name in names}
            if "answer" in names
            else {}
        )

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The measure, negated, for analyses that take a loss of outputs [row, …] and ids; None: the model's own."""
        if self.kind == "loss":
            return None
        kind, answer, wrong, place = self.kind, self.answer, self.wrong, self.position
        if kind == "likeness" and resident(self.plain.name).has_lm_head:
            raise AnalysisError(
                f"{self.plain.name} predicts masked tokens and the text has none, so there is no answer; "
                "put the mask token into the text"
            )
        hidden = torch.as_tensor(self.plain.hidden)

        def negated(outputs: Tensor, ids: Tensor) -> Tensor:
            if kind == "match":
                return -outputs.double()
            if kind == "likeness":
                return -torch.nn.functional.cosine_similarity(outputs.double(), hidden[None], dim=-1).mean(-1)
            row = outputs if outputs.dim() == 2 else outputs[:, place]
            known = row.double().log_softmax(-1)
            found = known[:, answer]
            if kind == "difference" and wrong is not None:
                found = found - known[:, wrong]
            return -(found.exp() if kind == "probability" else found)

        return negated


def kinds(run: Run) -> list[str]:
    """The kinds of measure that a run has, the first the one to begin with."""
    found = ["difference", "log_probability", "probability"] if run.logits.size > 1 else []
    found += ["match"] if run.similarity is not None else []
    found += ["loss"] if run.loss is not None else []
    found += ["likeness"] if run.hidden.size else []
    return ["none"] if run.of_record else found


def likeliest(run: Run, count: int = 10) -> list[int]:
    """The ids of the likeliest tokens or classes."""
    return np.argsort(-run.logits, kind="stable")[:count].tolist()


def of(state: State, plain: Run) -> Measure:
    """The measure that a state chooses, for its run A."""
    offered = kinds(plain)
    if not offered:
        raise AnalysisError(f"{state.model} gives nothing that could be measured on this input")
    kind = state.kind if state.kind in offered else offered[0]
    answer = wrong = None
    if kind in ("difference", "log_probability", "probability"):
        ranked, count = likeliest(plain, 2), len(plain.logits)
        answer = state.answer if state.answer is not None and state.answer < count else ranked[0]
        other = next(each for each in ranked if each != answer)
        wrong = (
            state.wrong
            if state.wrong is not None and state.wrong < count and state.wrong != answer
            else other
        )
    label = KINDS[kind]
    if answer is not None and wrong is not None:
        # in one go, as a token may itself be called "distractor"
        named = {"answer": quoted(plain.label(answer)), "distractor": quoted(plain.label(wrong))}
        label = re.sub("answer|distractor", lambda found: named[found[0]], label)
    return Measure(kind, label, answer, wrong, plain.position, plain)


def quoted(token: str) -> str:
    return f"‹{cut(visible(token), 16)}›"


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    sizes = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / np.where(sizes > 0, sizes, 1)).mean())
