"""Clean and corrupt prompts of equal length, in groups that run together, from any form in which they are given.

Pairs of one length share a group, so there is no padding. Their score is defined in `_measures/pair_scores.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._prompts.examples import of_equal_length, one_by_one, refuse_more
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.texts import is_single, short

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


def side_by_side(model: HookedModel, clean: Any, corrupt: Any = None) -> PairExamples:
    """A list of pairs, from any form in which pairs are given.

    `clean` and `corrupt` are two texts, two lists of texts or two rows of ids of equal number. With `corrupt=None`,
    `clean` holds both: a list of pairs, examples of a prompt set, one pair, one example, or a tuple of two lists.
    """
    if corrupt is None:
        return _together(model, clean)
    if callable(corrupt) or corrupt == "logit_difference":
        raise AnalysisError(
            "a measure stands in the place of the corrupt prompts; give it by name, as measure=..."
        )
    for side, given in (("clean", clean), ("corrupt", corrupt)):
        if not isinstance(given, str | Tensor) and any(_is_pair(each) for each in given):
            raise AnalysisError(
                f"{side} holds pairs, and {'corrupt' if side == 'clean' else 'clean'} prompts are given too; give a "
                "list of pairs alone, or clean prompts and corrupt prompts"
            )
    sides = [one_by_one(model, given) for given in (clean, corrupt)]
    if len(sides[0]) != len(sides[1]):
        raise AnalysisError(
            f"there are {len(sides[0])} clean and {len(sides[1])} corrupt prompts; give pairs"
        )
    return list(zip(*sides, strict=True))


def _together(model: HookedModel, given: Any) -> PairExamples:
    """Pairs that were given without corrupt prompts beside them."""
    if _is_example(given):
        return [given]
    if isinstance(given, Iterator):
        return list(given)
    if isinstance(given, str | Mapping) or not hasattr(given, "__len__") or _is_prompts(given):
        raise AnalysisError(
            "corrupt is missing; give corrupt prompts behind the clean ones, or a list of (clean, corrupt) pairs in "
            "the place of clean"
        )
    if not isinstance(given, tuple) or len(given) != 2 or any(map(_is_pair, given)):
        return given
    if all(isinstance(side, list) and len(side) == 2 for side in given):
        raise AnalysisError(
            "two lists of two may be two pairs or two clean and two corrupt prompts; give [(clean, corrupt), …], or "
            "clean prompts and corrupt prompts as two arguments"
        )
    if all(is_single(side) or _is_row(side) for side in given):
        return [given]
    return side_by_side(model, *given)


def _is_example(given: Any) -> bool:
    return hasattr(given, "prompt") and hasattr(given, "corrupt")


def _is_pair(given: Any) -> bool:
    """Whether this is an example of a prompt set, or a tuple of two prompts."""
    prompts = isinstance(given, tuple) and len(given) == 2
    return _is_example(given) or (prompts and all(is_single(side) or _is_row(side) for side in given))


def _is_row(given: Any) -> bool:
    """Whether these are ids [position]."""
    if isinstance(given, Tensor | np.ndarray):
        return given.ndim == 1
    return isinstance(given, list) and len(given) > 0 and all(isinstance(each, int) for each in given)


def _is_prompts(given: Any) -> bool:
    """Whether these are prompts without a second side: texts, or ids [prompt, position]."""
    if isinstance(given, Tensor | np.ndarray):
        return given.ndim < 3
    return isinstance(given, list) and len(given) > 0 and all(isinstance(each, str) for each in given)


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
    if _is_example(pair):
        pair = (pair.prompt, pair.corrupt)
    if isinstance(pair, str | Mapping) or _is_row(pair) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise AnalysisError(f"pair {place} is not (clean, corrupt); give two prompts for each")
    both = []
    for given in pair:
        if not is_single(given) and not _is_row(given):
            raise AnalysisError(
                f"pair {place} holds {short(given)}; a side of a pair is one text, one conversation or ids [position]"
            )
        tokens = model.to_tokens(given)
        refuse_more(tokens)
        both.append(tokens.ids[0][tokens.mask[0]])
    if len(both[0]) != len(both[1]):
        raise AnalysisError(
            f"pair {place} has {len(both[0])} clean and {len(both[1])} corrupt tokens; the positions of a pair must be "
            "the same, so give prompts of equal length"
        )
    return both[0], both[1]
