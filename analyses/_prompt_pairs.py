"""Clean and corrupted prompts of equal length, in batches, and the measure of each pair.

Only pairs of the same length share a batch, so nothing is padded. What is asked of a pair is fixed once, on its own
clean and corrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.analyses._examples import Batch
from headwater.analyses._measure import Answer, Explained, Measure
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

# a pair is (clean, corrupted), texts or ids [position], or an example of a prompt set
Pairs = Sequence[Any]
PairMeasure = Measure | Literal["logit_difference"]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Ids [pair, position] of clean and corrupted prompts, `places` among all pairs, and the measure.

    `value(logits)` is [row] for rows that are whole copies of the pairs, one copy after another.
    """

    clean: Tensor
    corrupted: Tensor
    places: list[int]
    value: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Asked:
    """What is asked of the logits: a measure, or the answer's logit less that of a wrong one at a position."""

    measure: PairMeasure
    answer: Answer | None
    wrong: Answer | None
    position: int

    @property
    def settings(self) -> dict[str, Any]:
        """For the attributes of a result."""
        if self.measure != "logit_difference":
            return {
                "measure": getattr(self.measure, "__name__", str(self.measure)),
                "position": self.position,
            }
        given = {"answer": self.answer, "wrong": self.wrong, "position": self.position}
        return {"measure": self.measure} | {name: value for name, value in given.items() if value is not None}


def pair_batches(model: HookedModel, pairs: Pairs, asked: Asked, size: int) -> list[PairBatch]:
    """All pairs in batches of at most `size`, shorter ones first.

    Without an answer that of the example is taken, or what the model predicts on the clean prompt; without a wrong one
    the example's first, or what it rather predicts on the corrupted prompt than the answer.
    """
    if isinstance(asked.measure, str) and asked.measure != "logit_difference":
        raise AnalysisError(
            f"measure={asked.measure!r} is unknown; give logit_difference or a function of logits"
        )
    if size < 1:
        raise AnalysisError(f"batch_size={size} is too small; give 1 or more")
    if len(pairs) == 0:
        raise AnalysisError("pairs is empty; give at least one pair of a clean and a corrupted prompt")
    rows = [_ids(model, place, pair) for place, pair in enumerate(pairs)]
    by_length: dict[int, list[int]] = {}
    for place, (clean, _) in enumerate(rows):
        by_length.setdefault(len(clean), []).append(place)
    found = []
    for _, places in sorted(by_length.items()):
        for start in range(0, len(places), size):
            mine = places[start : start + size]
            clean, corrupted = (torch.stack([rows[place][n] for place in mine]) for n in (0, 1))
            value = _value(model, pairs, asked, clean, corrupted, mine)
            found.append(PairBatch(clean, corrupted, mine, value))
    return found


def _ids(model: HookedModel, place: int, pair: Any) -> tuple[Tensor, Tensor]:
    if hasattr(pair, "prompt") and hasattr(pair, "corrupted"):
        pair = (pair.prompt, pair.corrupted)
    if isinstance(pair, str) or len(pair) != 2:
        raise AnalysisError(f"pair {place} is not (clean, corrupted); give two prompts for each")
    both = []
    for given in pair:
        tokens = model.to_tokens(given if isinstance(given, str) else torch.as_tensor(given)[None])
        both.append(tokens.ids[0][tokens.mask[0]])
    if len(both[0]) != len(both[1]):
        raise AnalysisError(
            f"pair {place} has {len(both[0])} clean and {len(both[1])} corrupted tokens; the positions of a pair must "
            "be the same, so give prompts of equal length"
        )
    return both[0], both[1]


def _value(
    model: HookedModel, pairs: Pairs, asked: Asked, clean: Tensor, corrupted: Tensor, places: list[int]
) -> Callable[[Tensor], Tensor]:
    batch = Batch(clean, places)
    if asked.measure == "logit_difference":
        answer, wrong = _answers(model, pairs, asked, batch, corrupted)
        # of a batch alone, so that one answer per text is one per row
        batch = Batch(clean, list(range(len(places))))
        value = Explained(model, None, answer, wrong, asked.position, "logit").of(batch)
    else:
        assert not isinstance(asked.measure, str)
        if asked.answer is not None or asked.wrong is not None:
            raise AnalysisError("measure and answer ask for different things; give one of them")
        value = Explained(model, asked.measure, None, None, asked.position, "logit").of(batch)
    texts = torch.arange(len(places))
    return lambda logits: torch.cat([value(copy, texts) for copy in logits.split(len(places))])


def _answers(
    model: HookedModel, pairs: Pairs, asked: Asked, batch: Batch, corrupted: Tensor
) -> tuple[list[int], list[int]]:
    examples = [pairs[place] for place in batch.places]
    known = all(hasattr(example, "answer") and hasattr(example, "wrong") for example in examples)
    explained = Explained(model, None, asked.answer, asked.wrong, asked.position, "logit")
    reader = Batch(batch.ids, list(range(len(examples))))
    answer, wrong = explained.ids_of("answer", batch), explained.ids_of("wrong", batch)
    if answer is None and known:
        given = Explained(model, None, [e.answer for e in examples], None, asked.position, "logit")
        answer = given.ids_of("answer", reader)
    if answer is None:
        answer = model(batch.ids)[:, asked.position].argmax(-1).tolist()
    if wrong is None and known:
        given = Explained(model, None, None, [e.wrong[0] for e in examples], asked.position, "logit")
        wrong = given.ids_of("wrong", reader)
    if wrong is None:
        row = model(corrupted)[:, asked.position].float()
        places = torch.tensor(answer, device=row.device)[:, None]
        wrong = row.scatter(1, places, float("-inf")).argmax(-1).tolist()
    assert answer is not None
    assert wrong is not None
    return answer, wrong
