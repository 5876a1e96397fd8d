"""The score of clean/corrupt pairs: the number that separates the two prompts and that patching moves.

The score is fixed on the two unpatched prompts: the difference of two tokens' logits at a position, of two classes'
logits, the similarity of each text and its own picture in two towers, or the user's own measure. Each copy of the
prompts is scored separately.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from headwater.analyses._measures.measure import Answer, Explained, Measure
from headwater.analyses._prompts.examples import Batch, one_each, refuse_infinite
from headwater.analyses._prompts.pairs import Pairs
from headwater.analyses._prompts.positions import place_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.signature import compares

How = Literal["denoise", "noise"]
PairMeasure = Measure | Literal["logit_difference"]
AnswerOfPairs = Annotated[
    Answer | None,
    "the clean prompts' answer, one or one per pair; none: the example's, or what the model predicts",
]
WrongOfPairs = Annotated[
    Answer | None,
    "token to compare with; none: the example's first, or what the model predicts for the corrupt prompt",
]
LEAST = 1e-6  # below this difference of clean and corrupt scores an effect is undefined


@dataclass(frozen=True, eq=False)
class Told:
    """The score of a batch of equally long clean/corrupt pairs. `clean`, `corrupt`: of the unpatched prompts, float64
    [pair].

    `position` is the position whose logits are read and `tokens` (sorted) the tokens; None if all may be read.
    """

    clean: Tensor
    corrupt: Tensor
    position: int | None
    tokens: Tensor | None
    value: Callable[[Tensor], Tensor]  # logits of copies of the pairs, copy after copy → one number per row

    def of(self, logits: Tensor, copies: int) -> Tensor:
        """The scores [copy, pair] of the logits of copies, float64."""
        return self.value(logits).unflatten(0, (copies, -1)).double().cpu()

    @property
    def ends(self) -> Tensor:
        """The scores of both prompts, [2, pair]."""
        return torch.stack([self.clean, self.corrupt])

    def unpatched(self, how: How) -> Tensor:
        """The score [pair] of the prompt that is patched."""
        return self.corrupt if how == "denoise" else self.clean

    def effect(self, patched: Tensor, how: How) -> Tensor:
        """`patched` [cell, pair] on the scale from the unpatched score (0) to that of the other prompt (1)."""
        begin = self.unpatched(how)
        way = (self.clean if how == "denoise" else self.corrupt) - begin
        return (patched - begin) / way.masked_fill(way.abs() < LEAST, torch.nan)


@dataclass(frozen=True)
class Asked:
    """The settings of a score: a measure, or the answer's logit minus a wrong one's at a position."""

    measure: PairMeasure
    answer: Answer | None
    wrong: Answer | None
    position: int

    def __post_init__(self) -> None:
        if not callable(self.measure) and self.measure != "logit_difference":
            raise AnalysisError(
                f"measure={self.measure!r} is unknown; give 'logit_difference' or a function of logits"
            )
        if callable(self.measure) and (self.answer is not None or self.wrong is not None):
            raise AnalysisError("measure and answer ask for different things; give one of them")

    @property
    def settings(self) -> dict[str, Any]:
        """For the attributes of a result, beside the settings of the analysis."""
        return {"measure": getattr(self.measure, "__name__", str(self.measure))}

    def place(self, model: HookedModel, pairs: Pairs) -> int | None:
        """The position that is read, counted from the left; None where all may be read: by the user's measure, and
        where the outputs are not logits of tokens."""
        if callable(self.measure) or not model.has_lm_head:
            return None
        return place_of(self.position, pairs.length, f"pair {pairs.places[0]}")

    def told(self, model: HookedModel, pairs: Pairs, clean: Tensor, corrupt: Tensor) -> Told:
        """Fix the score from what `outputs_of` gives for both prompts: logits [pair, position (all, or the one that is
        read), vocab] or [pair, class], or similarities [pair]."""
        place, tokens = self.place(model, pairs), None
        if callable(self.measure):
            value = _of_each(self.measure, len(pairs.places))
        elif compares(model.hf):
            value = _similarity
        else:
            if not model.has_lm_head and not model.classes:
                raise AnalysisError(f"{model.name} has no logits to compare; give measure(hidden) → [pair]")
            at = self.position if place is None else place
            right, other = self._answers(model, pairs, _at(clean, at), _at(corrupt, at))
            if (right == other).any():
                same = int((right == other).nonzero()[0])
                number = int(right[same])
                name = model.to_strings([number])[0] if model.has_lm_head else model.classes[number]
                raise AnalysisError(
                    f"the answer of pair {pairs.places[same]} and the wrong token are both {name!r}; give two that "
                    "differ"
                )
            tokens = torch.cat([right, other]).unique() if model.has_lm_head else None
            value = _difference(at, right, other, tokens)
        with torch.no_grad():
            ends = [value(logits).double().cpu() for logits in (clean, corrupt)]
        for name, numbers in zip(("clean", "corrupt"), ends, strict=True):
            refuse_infinite(numbers, f"the measure of the {name} prompt of pair", pairs.places)
        return Told(ends[0], ends[1], place, tokens, value)

    def _answers(
        self, model: HookedModel, pairs: Pairs, clean: Tensor, corrupt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two tokens of each pair: as given, else from the examples, else predicted by the model: the likeliest
        token on the clean prompt, and the likeliest other token on the corrupt one.
        """
        among_all, among_these = Batch(pairs.clean, pairs.places), Batch(pairs.clean, [*range(len(clean))])
        asked = Explained(model, None, self.answer, self.wrong, self.position, "logit", True)
        known = Explained(model, None, pairs.answers, pairs.wrongs, self.position, "logit", True)
        found: list[Tensor] = []
        for what in ("answer", "wrong"):
            ids = asked.ids_of(what, among_all)
            ids = known.ids_of(what, among_these) if ids is None else ids
            if ids is not None:
                found.append(torch.tensor(ids, device=clean.device))
            elif what == "answer":
                found.append(clean.argmax(-1))
            else:
                found.append(corrupt.scatter(1, found[0][:, None], float("-inf")).argmax(-1))
        return found[0], found[1]


def _at(logits: Tensor, place: int) -> Tensor:
    """Logits [row, token or class] of one position, or of a whole example."""
    return logits if logits.dim() == 2 else logits[:, 0 if logits.shape[1] == 1 else place]


def _similarity(found: Tensor) -> Tensor:
    return found


def _of_each(measure: Measure, count: int) -> Callable[[Tensor], Tensor]:
    """The user's measure, called on one copy of the pairs at a time."""
    return lambda logits: torch.cat(
        [one_each(measure(copy), count, "measure", "pair") for copy in logits.split(count)]
    )


def _difference(
    place: int, right: Tensor, other: Tensor, tokens: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The difference of two tokens' or classes' logits. The logits are of all tokens, or of `tokens` alone."""

    def value(logits: Tensor) -> Tensor:
        row = _at(logits, place)
        row = row if row.dtype == torch.float64 else row.float()
        narrow = tokens is not None and row.shape[1] == len(tokens)
        pair = (torch.searchsorted(tokens, ids) if narrow else ids for ids in (right, other))  # type: ignore[arg-type]
        one, two = (row.gather(1, ids.repeat(len(row) // len(ids))[:, None])[:, 0] for ids in pair)
        return one - two

    return value
