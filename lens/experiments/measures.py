"""What an experiment asks of a model about one prompt, by name, as plain numbers that JSON holds.

| name | value | needs |
|---|---|---|
| loss | `model.loss`, nats: the mean over next tokens, or of the label | two tokens, or a label |
| next_token | the 10 likeliest next tokens: ids, texts, probabilities | a causal model |
| class | the 10 likeliest classes: ids, labels, probabilities | a classifier |
| logit_difference | logit of the answer less the mean logit of the wrong ones, last position or class | answer, wrong |
| probability | probability of the answer at the last position, or of the class | answer |
| similarity | mean cosine of the last hidden states with those of the run without edits | |
| attention:L.H | exact weights [query, key] of one head, at most 256 tokens | |
| a statistic | its mean over the queries or keys that have one, [layer, head] | |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.kernels.maps import statistics as kernel
from headwater.lens.errors import ExperimentError, nearest
from headwater.lens.models.axes import axis
from headwater.lens.models.signature import compares
from headwater.lens.models.token_ids import class_id, token_id
from headwater.lens.naming.heads import Head
from headwater.lens.naming.tokens import Tokens

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

OUTPUTS = ("loss", "next_token", "class", "logit_difference", "probability", "similarity")
STATISTICS = tuple(name for name in kernel.NAMES if name not in kernel.GROUPED)
NAMES = (*OUTPUTS, *STATISTICS)
LIKELIEST = 10
LONGEST_MAP = 256
ATTENTION = "attention:"


def check(name: str) -> None:
    """ExperimentError where no measure is called so."""
    if isinstance(name, str) and name.startswith(ATTENTION):
        Head.parse(name.removeprefix(ATTENTION))
    elif name not in NAMES:
        raise ExperimentError(f"unknown measure {name!r}: {nearest(name, (*NAMES, ATTENTION + '2.1'))}")


def measure(
    model: HookedModel, found: Tokens, names: Sequence[str], answer: int | None, wrong: Sequence[int],
    hidden: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """The named measures of one prompt [1, position]; `hidden` are the last hidden states without edits."""
    values: dict[str, Any] = {}
    last = None
    if {"next_token", "class", "logit_difference", "probability"} & set(names):
        last = _last(model, found)
    for name in names:
        if name == "loss":
            values[name] = float(model.loss(found)[0])
        elif name in ("next_token", "class") and last is not None:
            if (name == "class") is not gives_classes(model):
                raise ExperimentError(
                    f"{name} has no meaning for {model.name}, which gives "
                    f"{'classes; ask for class' if name == 'next_token' else 'no classes'}; leave it out"
                )
            values[name] = _likeliest(model, last)
        elif name == "similarity":
            values[name] = _similarity(model.embeddings(found), hidden)
        elif last is not None and name in OUTPUTS:
            if answer is None or (name == "logit_difference" and not wrong):
                raise ExperimentError(f"{name} needs 'answer' and, for a difference, 'wrong' in every prompt")
            if name == "probability":
                values[name] = float(last.softmax(-1)[answer])
            else:
                values[name] = float(last[answer] - last[list(wrong)].mean())
    wanted = tuple(n for n in names if n in STATISTICS)
    heads = [n for n in names if n.startswith(ATTENTION)]
    if wanted or heads:
        values |= _of_record(model, found, wanted, heads)
    return {name: values[name] for name in names}


def gives_classes(model: HookedModel) -> bool:
    """Whether the answer is a class of the whole example, and not a token."""
    return bool(model.classes) and not model.has_lm_head


def named(model: HookedModel, given: str | int, what: str) -> int:
    """The token or the class that an answer names."""
    return (class_id if gives_classes(model) else token_id)(model, given, what)


def _last(model: HookedModel, found: Tokens) -> Tensor:
    """Logits of the last position [vocab], or of the classes [class]."""
    logits = model(found).double()
    if compares(model.hf):
        raise ExperimentError(f"{model.name} gives the similarity of pictures and texts; ask for loss alone")
    return logits[0] if logits.dim() == 2 else logits[0, -1]


def _likeliest(model: HookedModel, logits: Tensor) -> dict[str, list]:
    ranked = logits.argsort(descending=True, stable=True)[:LIKELIEST]
    ids, probabilities = ranked.tolist(), logits.softmax(-1)[ranked].tolist()
    if gives_classes(model):
        return {"ids": ids, "labels": [model.classes[i] for i in ids], "probabilities": probabilities}
    return {"ids": ids, "tokens": model.to_strings(ids), "probabilities": probabilities}


def _similarity(hidden: Tensor, before: Tensor | None) -> float:
    if before is None:
        return 1.0
    return float(torch.nn.functional.cosine_similarity(hidden[0].double(), before[0].double(), dim=-1).mean())


def _of_record(
    model: HookedModel, found: Tokens, statistics: tuple[str, ...], heads: list[str]
) -> dict[str, Any]:
    part = model.parts[model.part_name]
    axes = [axis(part, name, found) for name in (part.queries, part.keys)]
    length = max(tokens.ids.shape[1] for tokens in axes if tokens is not None)
    if heads and length > LONGEST_MAP:
        raise ExperimentError(
            f"{heads[0]}: the prompt has {length} tokens, and whole maps are measured up to {LONGEST_MAP}; leave it out"
        )
    record = model.record(found, statistics=statistics, keep=("qk",) if heads else ())
    values: dict[str, Any] = {}
    for name in statistics:
        numbers = record.statistics[name][0].double()  # [layer, head, query or key]
        numbers = numbers.masked_fill(numbers < 0, torch.nan) if name == "argmax" else numbers
        values[name] = [[None if math.isnan(x) else x for x in row] for row in numbers.nanmean(-1).tolist()]
    for name in heads:
        head = Head.parse(name.removeprefix(ATTENTION))
        values[name] = record.pattern(head.layer, head.head)[0].tolist()
    return values
