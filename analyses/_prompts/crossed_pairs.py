"""Pairs of indirect objects in which one variable of the task is exchanged: the source has other names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

Variable = Literal["position", "answer"]


@dataclass(frozen=True)
class CrossedPair:
    """A prompt, one that differs in one thing (`corrupt`), and two answers.

    Of `cross_pairs`: a source, a base, and what the base says once the variable is exchanged, and before.
    """

    prompt: str
    corrupt: str
    answer: str
    wrong: tuple[str, ...]


def cross_pairs(
    model: HookedModel, examples: Sequence[Any], variable: Variable, seed: int = 0
) -> list[CrossedPair]:
    """Pairs for `align_subspace` from examples of the prompt set "indirect_object", with other names in the source.

    `variable="position"`: the source's answer stands at the other place of the two names; the base should say its own
    name at that place. "answer": the base should say the source's answer. Both prompts have the same template and as
    many tokens. AnalysisError where no two examples fit.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> pair = hw.analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=30), "position")[0]
    >>> pair.answer in pair.corrupt and pair.answer not in pair.prompt
    True
    """
    drawn, found = random.Random(seed), []
    for base in examples:
        names = {base.answer.strip(), base.wrong[0].strip()}
        others = [
            each
            for each in examples
            if each.template[5:] == base.template[5:]
            and not names & {each.answer.strip(), each.wrong[0].strip()}
        ]
        drawn.shuffle(others)
        for other in others:
            source, told = other.prompt, other.answer
            if variable == "position" and _first(base.prompt, *_two(base)) == _first(source, *_two(other)):
                source = other.corrupt
            label = base.wrong[0] if variable == "position" else told
            if model.to_tokens(source).shape == model.to_tokens(base.prompt).shape:
                found.append(CrossedPair(source, base.prompt, label, (base.answer,)))
                break
    if not found:
        raise AnalysisError(
            f"no two of {len(examples)} examples have one template and other names; give more"
        )
    return found


def _two(example: Any) -> tuple[str, str]:
    return example.answer.strip(), example.wrong[0].strip()


def _first(prompt: str, one: str, other: str) -> bool:
    """Whether the answer is the first name of the prompt, as it was drawn."""
    return prompt.index(one) < prompt.index(other)
