"""Examples in batches whose rows have equal lengths, and the loss of each example.

An example may be a text, a picture, a sound, two texts, or several of these; what belongs to it stays with it. Only
examples that are equally long on every axis share a batch. There is no padding, positions are those of the example
alone, and a loss of the user gets real tokens only. Many texts of different lengths therefore run one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError, PromptError
from headwater.lens.model import HookedModel
from headwater.lens.models import inputs
from headwater.lens.models.axes import axis
from headwater.lens.models.classes import logits_of, own_similarity
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import FLOATS, compares, markers
from headwater.lens.naming.measured import Measured
from headwater.lens.naming.tokens import Tokens, is_of_tokens
from headwater.lens.progress import progress
from headwater.lens.running.forward import forward

Examples = Any  # all that `HookedModel.to_tokens` reads
Loss = Callable[
    [Tensor, Tensor], Tensor
]  # (logits, or last hidden states without a head, token ids) -> [batch]


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids [batch, position] of equally long examples, and the place of each among all examples.

    `ids` are `Tokens` where examples have further inputs, such as pictures; every run takes them as they are.
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

    def copies(self, count: int) -> Batch:
        """The batch `count` times over, copy after copy."""
        rows = self.rows(torch.arange(len(self.ids)).repeat(count))
        return replace(self, ids=rows, places=self.places * count)


Value = Callable[[Batch], Tensor]  # batch -> finite loss per example [batch]


def batches_of(model: HookedModel, examples: Examples, size: int) -> list[Batch]:
    """All examples in batches of at most `size`, shorter ones first; padding is cut off."""
    if isinstance(examples, Sequence) and not isinstance(examples, str) and len(examples) == 0:
        raise AnalysisError("examples is empty; give at least one text or row of tokens")
    tokens = model.to_tokens(examples)
    if compares(model.hf):
        for name, given in tokens.more.items():
            if name in FLOATS and len(given) != len(tokens):
                raise AnalysisError(
                    f"{model.name} compares each text with one {FLOATS[name]}; got {len(tokens)} texts and "
                    f"{len(given)} of {name}; give as many"
                )
    return [
        Batch(without_padding(tokens.rows(places)), places, len(tokens))
        for places in of_equal_length(lengths_on_axes(model, tokens), size)
    ]


def lengths_on_axes(model: HookedModel, tokens: Tokens) -> list[tuple[int, ...]]:
    """Of each row: the number of its tokens, of the encoder's, and of those that stand for images and other inputs."""
    found = [tokens.mask.sum(-1)]
    if (source := _source_mask(tokens)) is not None:
        found.append(source.sum(-1))
    found += [((tokens.ids == m) & tokens.mask).sum(-1) for m in markers(model.hf).values()]
    return [tuple(map(int, row)) for row in zip(*(each.tolist() for each in found), strict=True)]


def shape_of(model: HookedModel, row: Tensor) -> tuple[Any, ...]:
    """What an example [1, position] must have in common with those that it runs with."""
    tokens = as_tokens(row)
    more = tuple((name, *given.shape) for name, given in sorted(tokens.more.items()))
    return *lengths_on_axes(model, tokens)[0], more


def _source_mask(tokens: Tokens) -> Tensor | None:
    """Which tokens of an encoder's text are real, bool [batch, position]; None without such a text."""
    source = tokens.more.get("input_ids")
    if source is None:
        return None
    mask = tokens.more.get("attention_mask")
    return torch.ones_like(source, dtype=torch.bool) if mask is None else mask.bool()


def without_padding(some: Tokens) -> Tensor:
    """Rows of equal length without their padding; a plain tensor if they hold nothing beside ids. Inputs of a module
    outside transformers keep it: nobody knows how they hold their tokens."""
    if isinstance(some, Measured):
        return some
    source = _source_mask(some)

    def real(name: str, given: Tensor) -> Tensor:
        """The real tokens of an input that has one value for each token of the main text, or of the encoder's."""
        mask = some.mask if source is None or name.startswith("decoder_") else source
        if not is_of_tokens(name, given, mask.shape) or bool(mask.all()):
            return given
        return given[mask.to(given.device)].view(len(given), -1, *given.shape[2:])

    ids = real("decoder_input_ids", some.ids)
    if not some.more and some.labels is None:
        return ids
    more = {name: real(name, given) for name, given in some.more.items()}
    labels = some.labels if some.labels is None else real("decoder_labels", some.labels)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), more, labels, some.owners)


def of_equal_length(lengths: Sequence[Any], size: int | None) -> list[list[int]]:
    """Places of equal length (or lengths) in groups of at most `size` (None: all), shorter ones first."""
    found: dict[Any, list[int]] = {}
    for place, length in enumerate(lengths):
        found.setdefault(length, []).append(place)
    return [
        places[start : start + (size or len(places))]
        for _, places in sorted(found.items())
        for start in range(0, len(places), size or len(places))
    ]


def as_tokens(ids: Tensor) -> Tokens:
    """Rows of a batch, which have no padding, as `Tokens`."""
    return ids if isinstance(ids, Tokens) else Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def queries_of(model: HookedModel, ids: Tensor) -> Tokens:
    """The tokens on the query axis of the model's part; AnalysisError where the examples have nothing for it."""
    return _on_axis(model, ids, model.parts[model.part_name].queries)


def keys_of(model: HookedModel, ids: Tensor) -> Tokens:
    """The tokens on the key axis of the model's part: the encoder's, where the part is cross-attention."""
    return _on_axis(model, ids, model.parts[model.part_name].keys)


def _on_axis(model: HookedModel, ids: Tensor, name: str) -> Tokens:
    part = model.parts[model.part_name]
    found = axis(part, name, as_tokens(ids))
    if found is None:
        raise AnalysisError(
            f"the examples hold nothing for the part {part.name!r} of {model.name}; give its input too"
        )
    return found


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


def lengths_of(model: HookedModel, batches: list[Batch]) -> list[int]:
    """Number of tokens of each example on the query axis of the model's part, in the order they were given."""
    lengths: dict[int, int] = {}
    for batch in batches:
        count = queries_of(model, batch.ids).mask.sum() // len(batch.ids)
        lengths |= dict.fromkeys(batch.places, int(count))
    return [lengths[place] for place in sorted(lengths)]


def repeated_tokens(model: HookedModel, length: int, sequences: int, seed: int, bos: int | None) -> Tensor:
    """[bos] + r + r as token ids [batch, position]; the same for the same seed on every machine."""
    special = {bos, *(getattr(model.tokenizer, "all_special_ids", None) or []), *markers(model.hf).values()}
    drawable = torch.tensor(
        [token for token in range(model.vocab) if token not in special] or list(range(model.vocab))
    )
    picks = torch.randint(len(drawable), (sequences, length), generator=torch.Generator().manual_seed(seed))
    copy = drawable[picks]
    start = [] if bos is None else [torch.full((sequences, 1), bos)]
    return torch.cat([*start, copy, copy], 1)


def without_tokens(ids: Tensor, gone: Tensor) -> Tensor:
    """Rows [row, position] without some positions, `gone` bool [position], and without what belongs to these."""
    tokens = as_tokens(ids)
    return without_padding(tokens.changed(tokens.ids, tokens.mask & ~gone.to(tokens.mask.device)))


def first_tokens(rows: Sequence[Tensor], length: int) -> Tensor:
    """The first `length` tokens of rows [1, position], with what belongs to these, [row, position]."""
    return joined([without_tokens(row, torch.arange(row.shape[1]) >= length) for row in rows])


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows of equal shapes under each other, with their further inputs."""
    measured = [row for row in rows if isinstance(row, Measured)]
    if measured:
        return Measured.joined(measured)
    ids = torch.cat([row.as_subclass(Tensor) for row in rows])
    tokens = [row for row in rows if isinstance(row, Tokens)]
    if not tokens:
        return ids
    more = {name: torch.cat([row.more[name] for row in tokens]) for name in tokens[0].more}
    labels = [row.labels for row in tokens if row.labels is not None]
    known = torch.cat(labels) if len(labels) == len(rows) else None
    starts = torch.tensor([0, *(len(row) for row in tokens[:-1])]).cumsum(0)
    owners = {
        name: torch.cat([row.owners[name].cpu() + start for row, start in zip(tokens, starts, strict=True)])
        for name in tokens[0].owners
    }
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), more, known, owners)


def outputs_of(model: HookedModel) -> Callable[..., Tensor]:
    """What the whole model gives: logits of tokens or classes; of two towers the cosine similarity of each example's
    own text and picture, [row]; without a head the last hidden states."""
    if compares(model.hf):
        return partial(_similarity, model)
    return model if model.has_lm_head or model.classes else whole_of(model).embeddings


def whole_of(model: HookedModel) -> HookedModel:
    """The model seen from its main part, to which outputs and losses belong."""
    main = next(iter(model.parts))
    return model if model.part_name == main else model.part(main)


def _similarity(model: HookedModel, ids: Tensor, grad: bool = False) -> Tensor:
    return output_in(model, forward(model, model.to_tokens(ids), grad))


def output_in(model: Opened, out: Any) -> Tensor:
    """What `outputs_of` gives, read off the output object of transformers."""
    if compares(model.hf):
        found = own_similarity(out)
        if found is None:
            raise AnalysisError(f"{model.name} gives no embeddings of its two towers to compare")
        return found
    logits = logits_of(out) if model.has_lm_head or model.classes else None
    return inputs.last_hidden(out, next(iter(model.parts))) if logits is None else logits


def loss_of(model: HookedModel, loss: Loss | None, grad: bool = False) -> Value:
    """The loss of each example of a batch: the user's, or that of `model.loss`; never NaN or infinite. With `grad`
    gradients are tracked even if no gate requires one."""
    check_function(loss, "loss", ("outputs", "tokens"))
    outputs, whole = outputs_of(model), whole_of(model)

    def value(batch: Batch) -> Tensor:
        try:
            ids = batch.ids
            found = whole.loss(ids, grad=grad) if loss is None else loss(outputs(ids, grad=grad), ids)
        except PromptError as error:
            raise AnalysisError(f"example {batch.places[0]}: {error}") from None
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
