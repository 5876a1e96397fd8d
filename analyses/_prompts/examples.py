"""Examples in batches of equal length, and the loss of each example.

Only texts of the same length share a batch, so no padding exists, positions are those of the text alone, and
a loss given by the user sees nothing but real tokens. Many texts of different lengths therefore run one by
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    return [
        Batch(torch.stack([rows[place] for place in places[i : i + size]]), places[i : i + size])
        for _, places in sorted(by_length.items())
        for i in range(0, len(places), size)
    ]


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
        if not isinstance(found, Tensor) or found.shape != (len(batch.ids),):
            raise AnalysisError(
                f"loss must return one value per example, shape ({len(batch.ids)},), got {_kind(found)}"
            )
        if not found.isfinite().all():
            bad = batch.places[int((~found.isfinite()).nonzero()[0])]
            raise AnalysisError(
                f"the loss of example {bad} is {found[~found.isfinite()][0]}; give a loss that is finite"
            )
        return found

    return value


def _kind(found: object) -> str:
    return f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
