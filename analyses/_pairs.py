"""Pairs of a clean and a corrupt prompt of equal length, and the number that patching between them is to move.

Pairs of one length run together; no padding is ever run. The number is the difference of two tokens' logits at a
position, or the user's own, asked of every copy of the prompts by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from headwater.analyses._examples import Batch, Examples, batches_of
from headwater.analyses._measure import Answer, Explained, Measure
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

How = Literal["denoise", "noise"]
PairMeasure = Measure | Literal["logit_difference"]
AnswerOfPairs = Annotated[
    Answer | None, "the clean prompts' answer, one or one per pair; none: what the model predicts there"
]
WrongOfPairs = Annotated[
    Answer | None, "token to compare with; none: what the model predicts for the corrupt prompt, or its second choice"
]  # fmt: skip
LEAST = 1e-6  # a pair whose clean and corrupt prompts differ by less has no effect to speak of


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one length: token ids [pair, position] of both sides, and the place of each pair among all.

    `first` is the first position at which any pair differs; in a causal model nothing differs before it.
    """

    clean: Batch
    corrupt: Batch
    first: int

    @property
    def places(self) -> list[int]:
        return self.clean.places

    @property
    def length(self) -> int:
        return self.clean.ids.shape[1]


def pairs_of(model: HookedModel, clean: Examples, corrupt: Examples) -> list[Pairs]:
    """All pairs in groups of equal length; an error names the first pair that has none."""
    if model.part_name != "text":
        raise AnalysisError(
            f"{model.name} is read as its {model.part_name}; patching takes models of one text"
        )
    sides = []
    for given in (clean, corrupt):
        rows: dict[int, Tensor] = {}
        for batch in batches_of(model, given, 1):
            rows[batch.places[0]] = batch.ids[0]
        sides.append([rows[place] for place in sorted(rows)])
    if len(sides[0]) != len(sides[1]):
        raise AnalysisError(
            f"there are {len(sides[0])} clean and {len(sides[1])} corrupt prompts; give pairs"
        )
    groups: dict[int, list[int]] = {}
    for place, (one, other) in enumerate(zip(*sides, strict=True)):
        if len(one) != len(other):
            raise AnalysisError(
                f"pair {place} has {len(one)} clean and {len(other)} corrupt tokens; give pairs of equal length"
            )
        groups.setdefault(len(one), []).append(place)
    return [_group(sides, places) for _, places in sorted(groups.items())]


def _group(sides: list[list[Tensor]], places: list[int]) -> Pairs:
    clean, corrupt = (torch.stack([side[place] for place in places]) for side in sides)
    differ = (clean != corrupt).any(0).nonzero()[:, 0]
    first = int(differ[0]) if len(differ) else clean.shape[1]
    return Pairs(Batch(clean, places), Batch(corrupt, places), first)


@dataclass(frozen=True, eq=False)
class Moved:
    """The number to be moved, of one group of pairs: `clean` and `corrupt` [pair] in float64, and `of` any logits.

    `position` is the one that is read, None where all may be.
    """

    clean: Tensor
    corrupt: Tensor
    position: int | None
    value: Callable[[Tensor], Tensor]

    def of(self, logits: Tensor, copies: int) -> Tensor:
        """[copy, pair] in float64, of logits [copy · pair, position (1 where one is read), vocab]."""
        found = [self.value(rows) for rows in logits.unflatten(0, (copies, -1))]
        return torch.stack(found).double().cpu()

    def effect(self, patched: Tensor, how: How) -> Tensor:
        """Where `patched` [cell, pair] lies on the way from the run that was patched (0) to the other (1)."""
        begin, end = (self.corrupt, self.clean) if how == "denoise" else (self.clean, self.corrupt)
        way = end - begin
        return (patched - begin) / way.masked_fill(way.abs() < LEAST, torch.nan)


def moved_of(
    model: HookedModel, pairs: Pairs, measure: PairMeasure, answer: Answer | None, wrong: Answer | None, position: int
) -> Moved:  # fmt: skip
    """Run both sides once and fix what is measured; logits of a finite value per pair, or an error."""
    if not model.has_lm_head:
        raise AnalysisError(f"{model.name} has no language head, so patching has no logits to measure")
    clean, corrupt = model(pairs.clean.ids), model(pairs.corrupt.ids)
    if callable(measure):
        if answer is not None or wrong is not None:
            raise AnalysisError("measure and answer ask for different things; give one of them")
        place, value = None, _checked(measure, len(pairs.places))
    elif measure == "logit_difference":
        if not -pairs.length <= position < pairs.length:
            raise AnalysisError(
                f"position={position}, but pair {pairs.places[0]} has {pairs.length} tokens; "
                f"give a position from {-pairs.length} to {pairs.length - 1}"
            )
        place = position % pairs.length
        clean, corrupt = clean[:, place, None], corrupt[:, place, None]
        right, other = _tokens(model, pairs, answer, wrong, position, clean[:, 0], corrupt[:, 0])
        value = lambda logits: _difference(logits[:, 0], right, other)  # noqa: E731
    else:
        raise AnalysisError(
            f"measure={measure!r} is unknown; give 'logit_difference' or a function of logits"
        )
    with torch.no_grad():
        found = Moved(value(clean).double().cpu(), value(corrupt).double().cpu(), place, value)
    for name, numbers in (("clean", found.clean), ("corrupt", found.corrupt)):
        if not numbers.isfinite().all():
            bad = pairs.places[int((~numbers.isfinite()).nonzero()[0])]
            raise AnalysisError(f"the measure of the {name} prompt of pair {bad} is not finite")
    return found


def measure_settings(
    measure: PairMeasure, answer: Answer | None, wrong: Answer | None, position: int
) -> dict[str, Any]:
    """For the attributes of a result."""
    if callable(measure):
        return {"measure": getattr(measure, "__name__", str(measure))}
    return {"measure": measure, "answer": answer, "wrong": wrong, "at": position}


def _checked(measure: Measure, count: int) -> Measure:
    def value(logits: Tensor) -> Tensor:
        found = measure(logits)
        if not isinstance(found, Tensor) or found.shape != (count,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AnalysisError(f"measure must return one value per pair, shape ({count},), got {got}")
        return found

    return value


def _difference(logits: Tensor, right: Tensor, other: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits.gather(1, right[:, None]) - logits.gather(1, other[:, None]))[:, 0]


def _tokens(
    model: HookedModel, pairs: Pairs, answer: Answer | None, wrong: Answer | None, position: int,
    clean: Tensor, corrupt: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two tokens of each pair; what is not given is what the model predicts at the position."""
    asked = Explained(model, None, answer, wrong, position, "logit")
    right, other = (asked.ids_of(what, pairs.clean) for what in ("answer", "wrong"))
    found = clean.argmax(-1) if right is None else torch.tensor(right, device=clean.device)
    if other is None:
        return found, corrupt.scatter(1, found[:, None], float("-inf")).argmax(-1)
    return found, torch.tensor(other, device=clean.device)
