"""Examples in batches of equal length, and the loss of each example.

Only texts of the same length share a batch. There is no padding, positions are those of the text alone, and a loss of
the user gets real tokens only. Many texts of different lengths therefore run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

Examples = str | Sequence[str] | Tensor
Loss = Callable[[Tensor, Tensor], Tensor]  # (logits or last hidden states, token ids) -> [batch]


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids [batch, position] of equally long examples, and the place of each among all examples."""

    ids: Tensor
    places: list[int]


Value = Callable[[Batch], Tensor]  # batch -> finite loss per example [batch]


def batches_of(model: HookedModel, examples: Examples, size: int) -> list[Batch]:
    """All examples in batches of at most `size`, shorter texts first; padding is cut off."""
    if not isinstance(examples, str) and len(examples) == 0:
        raise AnalysisError("examples is empty; give at least one text or row of tokens")
    tokens = model.to_tokens(examples)
    if tokens.more:
        raise AnalysisError(
            f"examples hold {next(iter(tokens.more))} beside text; this analysis reads text alone"
        )
    rows = [ids[mask] for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    groups = of_equal_length(list(map(len, rows)), size)
    return [Batch(torch.stack([rows[place] for place in places]), places) for places in groups]


def of_equal_length(lengths: Sequence[int], size: int | None) -> list[list[int]]:
    """Places of equal length in groups of at most `size` (None: all), shorter ones first."""
    found: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        found.setdefault(length, []).append(place)
    return [
        places[start : start + (size or len(places))]
        for _, places in sorted(found.items())
        for start in range(0, len(places), size or len(places))
    ]


def one_by_one(model: HookedModel, examples: Examples) -> list[Tensor]:
    """Ids [position] of every example, in their order."""
    rows = {batch.places[0]: batch.ids[0] for batch in batches_of(model, examples, 1)}
    return [rows[place] for place in sorted(rows)]


def drawn_in_turn(batches: list[Batch], steps: int, generator: torch.Generator, what: str) -> Iterator[Batch]:
    """A batch for each training step, in a random order that is redrawn after each epoch."""
    order = torch.arange(0)
    for step in tqdm(range(steps), desc=what, unit="step", disable=None):
        if step % len(batches) == 0:
            order = torch.randperm(len(batches), generator=generator)
        yield batches[int(order[step % len(batches)])]


def lengths_of(batches: list[Batch]) -> list[int]:
    """Number of tokens of each example, in the order they were given."""
    lengths = {place: batch.ids.shape[1] for batch in batches for place in batch.places}
    return [lengths[place] for place in sorted(lengths)]


def repeated_tokens(model: HookedModel, length: int, sequences: int, seed: int, bos: int | None) -> Tensor:
    """[bos] + r + r as token ids [batch, position]; the same for the same seed on every machine."""
    special = set(getattr(model.tokenizer, "all_special_ids", None) or []) | {bos}
    drawable = torch.tensor(
        [token for token in range(model.vocab) if token not in special] or list(range(model.vocab))
    )
    picks = torch.randint(len(drawable), (sequences, length), generator=torch.Generator().manual_seed(seed))
    copy = drawable[picks]
    start = [] if bos is None else [torch.full((sequences, 1), bos)]
    return torch.cat([*start, copy, copy], 1)


def loss_of(model: HookedModel, loss: Loss | None) -> Value:
    """The loss of each example of a batch: the user's, or the mean next-token loss in nats; never NaN or
    infinite."""
    if loss is None and not (model.has_lm_head and model.causal):
        raise AnalysisError(
            f"{model.name} has no next-token loss; give loss(hidden, tokens) → [batch], e.g. of the last hidden states"
        )
    outputs = model if model.has_lm_head else model.embeddings

    def value(batch: Batch) -> Tensor:
        if loss is None and batch.ids.shape[1] < 2:
            raise AnalysisError(
                f"example {batch.places[0]} has one token; the next-token loss needs two or more"
            )
        found = model.loss(batch.ids) if loss is None else loss(outputs(batch.ids), batch.ids)
        found = one_each(found, len(batch.ids), "loss", "example")
        refuse_infinite(found, "the loss of example", batch.places)
        return found

    return value


def one_each(found: object, count: int, what: str, of: str) -> Tensor:
    """The result of a user's function. AnalysisError unless it is one number for each of `count` items."""
    if not isinstance(found, Tensor) or found.shape != (count,):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise AnalysisError(f"{what} must return one value per {of}, shape ({count},), got {got}")
    return found


def refuse_infinite(numbers: Tensor, what: str, places: Sequence[int]) -> None:
    """AnalysisError with the place of the first number that is NaN or infinite."""
    if not numbers.isfinite().all():
        bad = int((~numbers.isfinite()).nonzero()[0])
        raise AnalysisError(f"{what} {places[bad]} is not finite ({numbers[bad]}); give one that is")
