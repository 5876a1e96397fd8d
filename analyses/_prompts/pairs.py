"""Clean and corrupt prompts of equal length, in groups that run together, from any form in which they are given.

A side of a pair is any one example: a text, token ids, a picture, a text with a picture, the texts of an encoder and a
decoder. Both sides are equally long on every axis. Pairs of one length share a group, so there is no padding. Their
score is defined in `_measures/pair_scores.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._prompts.examples import (
    as_tokens,
    joined,
    keys_of,
    lengths_on_axes,
    of_equal_length,
    queries_of,
    shape_of,
    singles_of,
    without_padding,
)
from headwater.lens.errors import AnalysisError, PromptError
from headwater.lens.media.pictures import is_picture
from headwater.lens.media.sounds import is_waveform
from headwater.lens.model import HookedModel
from headwater.lens.models.signature import markers
from headwater.lens.naming.texts import is_single, short
from headwater.lens.naming.tokens import Tokens

# a pair is (clean, corrupt), two examples, or an example of a prompt set
PairExamples = Sequence[Any]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one length: ids [pair, position] of both prompts, `Tokens` where there is more beside them, the index of
    each pair among all, and from prompt sets the answer and the first wrong answer of each; None unless known for all.
    """

    clean: Tensor
    corrupt: Tensor
    places: list[int]
    answers: list[str] | None = None
    wrongs: list[str] | None = None

    @property
    def length(self) -> int:
        return self.clean.shape[1]

    def positions(self, model: HookedModel) -> int:
        """The number of positions on the query axis of the model's part, whose activations can be replaced."""
        return queries_of(model, self.clean).shape[1]

    def axes(self, model: HookedModel) -> tuple[int, int]:
        """The number of positions on the query axis and on the key axis of the model's part."""
        return self.positions(model), keys_of(model, self.clean).shape[1]

    @property
    def beside(self) -> bool:
        """Whether there is more than token ids: pictures, an encoder's text, types of tokens."""
        return isinstance(self.clean, Tokens) and len(self.clean.more) > 0

    @property
    def first(self) -> int:
        """The first position at which any pair differs, or their length; 0 where what is beside the ids differs."""
        clean, corrupt = as_tokens(self.clean), as_tokens(self.corrupt)
        if any(not torch.equal(given, corrupt.more[name]) for name, given in clean.more.items()):
            return 0
        differ = (clean.ids != corrupt.ids).any(0).nonzero()[:, 0]
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
        if isinstance(given, list | tuple) and any(_is_pair(each) for each in given):
            raise AnalysisError(
                f"{side} holds pairs, and {'corrupt' if side == 'clean' else 'clean'} prompts are given too; give a "
                "list of pairs alone, or clean prompts and corrupt prompts"
            )
    sides = [
        [row if isinstance(row, Tokens) else row[0] for row in singles_of(model, given)]
        for given in (clean, corrupt)
    ]
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
    if all(map(_is_side, given)):
        return [given]
    return side_by_side(model, *given)


def _is_example(given: Any) -> bool:
    return hasattr(given, "prompt") and hasattr(given, "corrupt")


def _is_pair(given: Any) -> bool:
    """Whether this is an example of a prompt set, or a tuple of two prompts."""
    prompts = isinstance(given, tuple) and len(given) == 2
    return _is_example(given) or (prompts and all(map(_is_side, given)))


def _is_side(given: Any) -> bool:
    """Whether this may be one example: not a list of several."""
    if isinstance(given, Tokens):
        return len(given) == 1
    if _is_floats(given):
        return given.ndim < 4 or len(given) == 1  # a picture, or sound
    if is_single(given) or _is_row(given) or is_picture(given) or is_waveform(given):
        return True
    return not isinstance(given, str | list | tuple | Mapping | Tensor | np.ndarray | Number | None)


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
    if len(given) == 0:
        raise AnalysisError("pairs is empty; give at least one pair of a clean and a corrupt prompt")
    rows = [_sides(model, place, pair) for place, pair in enumerate(given)]
    found = []
    for places in of_equal_length([shape_of(model, clean) for clean, _ in rows], size):
        examples = [given[place] for place in places]
        known = all(hasattr(each, "answer") and hasattr(each, "wrong") for each in examples)
        clean, corrupt = (joined([rows[place][side] for place in places]) for side in (0, 1))
        answers = [each.answer for each in examples] if known else None
        wrongs = [each.wrong[0] for each in examples] if known else None
        found.append(Pairs(clean, corrupt, places, answers, wrongs))
    return found


def _sides(model: HookedModel, place: int, pair: Any) -> tuple[Tensor, Tensor]:
    """Both sides of a pair without padding, [1, position]."""
    if _is_example(pair):
        pair = (pair.prompt, pair.corrupt)
    if isinstance(pair, str | Mapping) or _is_row(pair) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise AnalysisError(f"pair {place} is not (clean, corrupt); give two prompts for each")
    both = []
    for given in pair:
        tokens = (
            _floats(model, given)
            if _is_floats(given)
            else model.to_tokens(given)
            if _is_side(given)
            else None
        )
        if tokens is None or len(tokens) != 1:
            raise AnalysisError(
                f"pair {place} holds {short(given)}; a side of a pair is one text, one conversation, ids [position], "
                "one picture or one example"
            )
        both.append(without_padding(tokens))
    _refuse_unequal(model, place, *both)
    return both[0], both[1]


def _is_floats(given: Any) -> bool:
    """Whether these are the numbers of a picture, a film or a sound."""
    return isinstance(given, Tensor | np.ndarray) and torch.as_tensor(given).is_floating_point()


def _floats(model: HookedModel, given: Tensor | np.ndarray) -> Tokens:
    """One picture, film or sound, with the axis of examples or without it."""
    try:
        tokens = model.to_tokens(given)
    except PromptError:
        tokens = None
    return tokens if tokens is not None and len(tokens) == 1 else model.to_tokens(given[None])


def _refuse_unequal(model: HookedModel, place: int, clean: Tensor, corrupt: Tensor) -> None:
    lengths = [lengths_on_axes(model, as_tokens(side))[0] for side in (clean, corrupt)]
    encoder = ["encoder's "] if len(lengths[0]) > 1 + len(markers(model.hf)) else []
    for of, one, other in zip(
        ["", *encoder, *(f"{kind} " for kind in markers(model.hf))], *lengths, strict=True
    ):
        if one != other:
            raise AnalysisError(
                f"pair {place} has {one} clean and {other} corrupt {of}tokens; the positions of a pair must be the "
                "same, so give prompts of equal length"
            )
    shapes = [{n: list(t.shape) for n, t in as_tokens(side).more.items()} for side in (clean, corrupt)]
    for name in sorted(set().union(*shapes)):
        if shapes[0].get(name) != shapes[1].get(name):
            raise AnalysisError(
                f"pair {place} has {name} {shapes[0].get(name, 'nowhere')} in the clean and "
                f"{shapes[1].get(name, 'nowhere')} in the corrupt example; give the same shape on both sides"
            )
