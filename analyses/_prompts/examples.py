"""Examples in batches of equal length, and the loss of each example.

Only texts of the same length share a batch. There is no padding, positions are those of the text alone, and a loss of
the user gets real tokens only. Many texts of different lengths therefore run one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress

Examples = str | Sequence[Any] | Tensor  # all that `HookedModel.to_tokens` reads
Loss = Callable[
    [Tensor, Tensor], Tensor
]  # (logits, or last hidden states without a head, token ids) -> [batch]


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids [batch, position] of equally long examples, and the place of each among all examples.

    `ids` are `Tokens` where examples have further inputs, such as `token_type_ids`; every run takes them as they are.
    """

    ids: Tensor
    places: list[int]
    of: int | None = None  # how many examples there are in all; None where nobody asks

    def rows(self, which: Tensor | list[int] | slice, ids: Tensor | None = None) -> Tensor:
        """Some rows of `ids` with their further inputs; `ids`, as many, stand in the place of theirs."""
        which = which.to(self.ids.device) if isinstance(which, Tensor) else which
        if isinstance(self.ids, Tokens):
            return self.ids.rows(which, ids)
        return self.ids[which] if ids is None else ids


Value = Callable[[Batch], Tensor]  # batch -> finite loss per example [batch]


def batches_of(model: HookedModel, examples: Examples, size: int, beside: bool = False) -> list[Batch]:
    """All examples in batches of at most `size`, shorter texts first; padding is cut off.

    Further inputs of every token, such as `token_type_ids`, go along; with `beside` those of every example too, such as
    `pixel_values`. Others are refused.
    """
    if isinstance(examples, Sequence) and not isinstance(examples, str) and len(examples) == 0:
        raise AnalysisError("examples is empty; give at least one text or row of tokens")
    tokens = model.to_tokens(examples)
    for name, given in tokens.more.items():
        if given.shape[:2] != tokens.shape and not (beside and len(given) == len(tokens)):
            raise AnalysisError(f"examples hold {name} beside text; this analysis reads text alone")
    lengths = tokens.mask.sum(-1).tolist()
    return [
        Batch(_together(tokens, places), places, len(tokens)) for places in of_equal_length(lengths, size)
    ]


def _together(tokens: Tokens, places: list[int]) -> Tensor:
    """Rows of equal length without their padding."""
    some = tokens.rows(places)

    def real(given: Tensor) -> Tensor:
        mask = some.mask.to(given.device)
        return given[mask].view(len(places), -1) if given.shape == mask.shape else given

    if not some.more:
        return real(some.ids)
    return Tokens(real(some.ids), real(some.mask), {name: real(given) for name, given in some.more.items()})


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
    """Ids [position] of every example, in their order; AnalysisError for examples with further inputs."""
    rows = singles_of(model, examples)
    refuse_more(rows[0])
    return [row[0] for row in rows]


def singles_of(model: HookedModel, examples: Examples) -> list[Tensor]:
    """Every example by itself, ids [1, position] with their further inputs, in their order."""
    rows = {batch.places[0]: batch.ids for batch in batches_of(model, examples, 1)}
    return [rows[place] for place in sorted(rows)]


def drawn_in_turn(batches: list[Batch], steps: int, generator: torch.Generator, what: str) -> Iterator[Batch]:
    """A batch for each training step, in a random order that is redrawn after each epoch."""
    order = torch.arange(0)
    for step in progress(range(steps), desc=what, unit="step"):
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


def without_tokens(ids: Tensor, gone: Tensor) -> Tensor:
    """Rows [row, position] without some positions, `gone` bool [position], and without what belongs to these."""
    kept = ids.as_subclass(Tensor)[:, ~gone]
    if not isinstance(ids, Tokens):
        return kept
    more = {name: given[:, ~gone] for name, given in ids.more.items()}
    return Tokens(kept, torch.ones_like(kept, dtype=torch.bool), more)


def first_tokens(rows: Sequence[Tensor], length: int) -> Tensor:
    """The first `length` tokens of rows [1, position], with their further inputs, [row, position]."""
    ids = torch.cat([row.as_subclass(Tensor)[:, :length] for row in rows])
    more = [row.more for row in rows if isinstance(row, Tokens)]
    if not more or not more[0]:
        return ids
    cut = {name: torch.cat([one[name][:, :length] for one in more]) for name in more[0]}
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), cut)


def refuse_more(ids: Tensor) -> None:
    """AnalysisError for tokens with further inputs."""
    if isinstance(ids, Tokens) and ids.more:
        raise AnalysisError(
            f"examples hold {next(iter(ids.more))} beside text; this analysis reads text alone"
        )


def outputs_of(model: HookedModel) -> Callable[..., Tensor]:
    """What the model gives: logits of tokens or classes, the last hidden states of a model without a head."""
    return model if model.has_lm_head or model.classes else model.embeddings


def loss_of(model: HookedModel, loss: Loss | None) -> Value:
    """The loss of each example of a batch: the user's, or the mean next-token loss in nats; never NaN or
    infinite."""
    if loss is None and not (model.has_lm_head and model.causal):
        given = "logits [batch, class]" if model.classes else "hidden"
        raise AnalysisError(
            f"{model.name} has no next-token loss; give loss({given}, tokens) → [batch] of what the model gives"
        )
    check_function(loss, "loss", ("outputs", "tokens"))
    outputs = outputs_of(model)

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


def check_function(function: object, what: str, takes: tuple[str, ...]) -> None:
    """AnalysisError unless `function` is None, or can be called with as many values as `takes` names."""
    if function is None:
        return
    form = f"give a function {what}({', '.join(takes)}) → [batch]"
    if not callable(function):
        raise AnalysisError(f"{what} is no function but of type {type(function).__name__}; {form}")
    try:
        inspect.signature(function).bind(*takes)
    except TypeError as error:
        raise AnalysisError(f"{what} can not be called: {error}; {form}") from None
    except ValueError:  # a function of another language says nothing of its arguments
        return


def differentiable(found: Tensor, what: str) -> Tensor:
    """`found`; AnalysisError where a user's function has cut the gradient."""
    if not found.requires_grad:
        raise AnalysisError(
            f"{what} has no gradient; compute it from what it is given, without detach, item, numpy or no_grad"
        )
    return found


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
