"""The token or the class that a user gives as a word or a number, and the labels of a batch of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headwater.lens.errors import PromptError, nearest
from headwater.lens.models.opened import Opened
from headwater.lens.naming.texts import encoding, short
from headwater.lens.naming.tokens import Tokens


def token_id(model: Opened, given: str | int, what: str) -> int:
    """The id of a token given as an id, as "#17", or as a word that is one token, by itself or after a space.

    PromptError for a word of several tokens, or one unknown to the tokenizer (but not for the unknown token itself).
    """
    given = int(given) if isinstance(given, Tensor) else given
    if isinstance(given, str) and given.startswith("#") and given[1:].isdecimal():
        given = int(given[1:])
    if not isinstance(given, str):
        if not 0 <= given < model.vocab:
            raise PromptError(
                f"{what}={given} is no token of {model.name}; ids go from 0 to {model.vocab - 1}"
            )
        return int(given)
    if model.tokenizer is None:
        raise PromptError(
            f"{what}={given!r} needs a tokenizer, which {model.name} lacks; write a token as #17"
        )
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    tried = [
        encoding(model.tokenizer, text, add_special_tokens=False)["input_ids"]
        for text in (given, f" {given}")
    ]
    for ids in tried:
        if len(ids) == 1 and (ids[0] != unknown or given == model.tokenizer.unk_token):
            return int(ids[0])
    pieces = ", ".join(map(repr, model.to_strings(tried[0])))
    raise PromptError(
        f"{what}={given!r} is not one token of {model.name} but {pieces}; give a word that is, or an id such as #17"
    )


def class_id(model: Opened, given: str | int, what: str) -> int:
    """The index of a class given by its label, as an index, or as "#1". PromptError for a class that there is not."""
    labels = model.classes
    given = int(given) if isinstance(given, Tensor) else given
    if isinstance(given, str) and given in labels:
        if labels.count(given) > 1:
            raise PromptError(
                f"{what}={given!r} is the label of several classes of {model.name}; give an index"
            )
        return labels.index(given)
    number = given.removeprefix("#") if isinstance(given, str) else str(given)
    if number.isdecimal() and int(number) < len(labels):
        return int(number)
    known = f"; {nearest(given, labels)}" if isinstance(given, str) else ""
    raise PromptError(
        f"{what}={given!r} is no class of {model.name}; give a label or an index from 0 to {len(labels) - 1}{known}"
    )


def labels_of(model: Opened, given: Any, tokens: Tokens) -> Tensor:
    """What is right for each example: class ids [batch], or token ids [batch, position] with -100 where nothing is
    asked.

    `given` is one class or token (a word or a number), one for each example, or integers of the tokens' shape. In a
    masked language model a word stands at the one mask of its text.
    """
    table = given if isinstance(given, Tensor) else _table(given)
    if table is not None and table.dim() == 2:
        if table.is_floating_point() or len(table) != len(tokens):
            raise PromptError(
                f"label is integers, a row for each of {len(tokens)} examples; got {table.dtype} {list(table.shape)}"
            )
        return table.long()
    single = isinstance(given, str) or (table is not None and not table.dim())
    each: list[Any] = [given] if single or not isinstance(given, Sequence | Tensor) else list(given)
    if len(each) != len(tokens):
        raise PromptError(f"there are {len(each)} labels for {len(tokens)} examples; give one each")
    if model.classes and not model.has_lm_head:
        return torch.tensor([class_id(model, one, "label") for one in each])
    if not model.has_lm_head or model.is_encoder_decoder or next(iter(model.parts.values())).causal:
        raise PromptError(
            f"label={short(given)} has no meaning for {model.name}, which has no classes and reads no masks; leave it "
            "out, or give token ids [batch, position] where it writes text"
        )
    mask = getattr(model.tokenizer, "mask_token_id", None)
    mask = getattr(model.hf.config, "mask_token_id", None) if mask is None else mask
    if mask is None:
        raise PromptError(
            f"which token of {model.name} is the mask is not known; give label as ids [batch, position], -100 elsewhere"
        )
    masked = (tokens.ids == mask) & tokens.mask
    if not bool((masked.sum(-1) == 1).all()):
        row = int((masked.sum(-1) != 1).nonzero()[0])
        raise PromptError(
            f"label is the token at the mask, and example {row} has {int(masked[row].sum())} masks; give one, or label "
            "as ids [batch, position], -100 elsewhere"
        )
    right = torch.tensor([token_id(model, one, "label") for one in each]).to(tokens.device)
    return torch.where(masked, right[:, None], -100)


def _table(given: Any) -> Tensor | None:
    """Numbers as a tensor; None where there are words among them."""
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return None
