"""Clean and corrupt prompts of equal length, in groups that run together, from any form in which they are given.

Pairs of one length share a group, so there is no padding. Their score is defined in `_measures/pair_scores.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Examples, of_equal_length, one_by_one
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

# a pair is (clean, corrupt), texts or ids [position], or an example of a prompt set
PairExamples = Sequence[Any]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one length: ids [pair, position] of both prompts, the index of each pair among all, and from prompt sets
    the answer and the first wrong answer of each; None unless known for all."""

    clean: Tensor
    corrupt: Tensor
    places: list[int]
    answers: list[str] | None = None
    wrongs: list[str] | None = None

    @property
    def length(self) -> int:
        return self.clean.shape[1]

    @property
    def first(self) -> int:
        """The first position at which any pair differs, or their length."""
        differ = (self.clean != self.corrupt).any(0).nonzero()[:, 0]
        return int(differ[0]) if len(differ) else self.length


def side_by_side(model: HookedModel, clean: Any, corrupt: Examples | None) -> PairExamples:
    """Pairs from two lists of prompts; with `corrupt=None`, `clean` holds pairs already."""
    if corrupt is None:
        if isinstance(clean, (str, Tensor)):
            raise AnalysisError(
                "corrupt is missing; give corrupt prompts, or a list of (clean, corrupt) pairs in the place of clean"
            )
        return clean
    sides = [one_by_one(model, given) for given in (clean, corrupt)]
    if len(sides[0]) != len(sides[1]):
        raise AnalysisError(
            f"there are {len(sides[0])} clean and {len(sides[1])} corrupt prompts; give pairs"
        )
    return list(zip(*sides, strict=True))


def pairs_of(model: HookedModel, given: PairExamples, size: int | None = None) -> list[Pairs]:
    """All pairs in groups of equal length and at most `size`, shorter ones first. AnalysisError for an invalid pair."""
    if model.part_name != "text":
        raise AnalysisError(
            f"{model.name} is read as its {model.part_name}; patching takes models of one text"
        )
    if not model.has_lm_head:
        raise AnalysisError(f"{model.name} has no language head, so there are no logits to measure")
    if len(given) == 0:
        raise AnalysisError("pairs is empty; give at least one pair of a clean and a corrupt prompt")
    rows = [_ids(model, place, pair) for place, pair in enumerate(given)]
    found = []
    for places in of_equal_length([len(clean) for clean, _ in rows], size):
        examples = [given[place] for place in places]
        known = all(hasattr(each, "answer") and hasattr(each, "wrong") for each in examples)
        clean, corrupt = (torch.stack([rows[place][side] for place in places]) for side in (0, 1))
        answers = [each.answer for each in examples] if known else None
        wrongs = [each.wrong[0] for each in examples] if known else None
        found.append(Pairs(clean, corrupt, places, answers, wrongs))
    return found


def _ids(model: HookedModel, place: int, pair: Any) -> tuple[Tensor, Tensor]:
    if hasattr(pair, "prompt") and hasattr(pair, "corrupt"):
        pair = (pair.prompt, pair.corrupt)
    if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise AnalysisError(f"pair {place} is not (clean, corrupt); give two prompts for each")
    both = []
    for given in pair:
        tokens = model.to_tokens(given if isinstance(given, str) else torch.as_tensor(given)[None])
        both.append(tokens.ids[0][tokens.mask[0]])
    if len(both[0]) != len(both[1]):
        raise AnalysisError(
            f"pair {place} has {len(both[0])} clean and {len(both[1])} corrupt tokens; the positions of a pair must be "
            "the same, so give prompts of equal length"
        )
    return both[0], both[1]
