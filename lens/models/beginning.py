"""`first_token`: which token is the first of a text, and who puts it there."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.models.opened import Opened
from headwater.lens.naming import texts
from headwater.lens.naming.tokens import Tokens

OWN = "the text's own (none is put before it)"


def first_token(model: Opened, given: Any = None) -> str:
    """The token that begins a text of `model`, as in "'<s>' (the tokenizer puts it)".

    `given` are prompts, whose own beginning is told; None is any text. "" for a model that reads no text.
    """
    if not model.vocab:
        return ""
    if model.tokenizer is not None and texts.is_text(given):
        return _of_texts(model, given)
    if isinstance(given, Tensor):
        mask = given.mask if isinstance(given, Tokens) else None
        return _of_ids(model, given.as_subclass(Tensor), mask)
    if model.tokenizer is None:
        return "not known: there is no tokenizer"
    try:
        row = texts.rows("a", model.tokenizer, model.prepend_bos)[0].ids
        bare = list(model.tokenizer("a", add_special_tokens=False)["input_ids"])
    except (PromptError, ValueError, KeyError):  # a tokenizer without "a"
        return "not known"
    if row[: len(bare)] == bare:
        return OWN
    by = "the tokenizer puts it" if model.prepend_bos is None else "prepend_bos=True"
    return f"{model.to_strings(row[:1])[0]!r} ({by})"


def _of_texts(model: Opened, given: Any) -> str:
    """As `first_token` of any text, or that the texts or their chat template write it themselves."""
    any_text = first_token(model)
    first = texts.beginning(model.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where the texts are read to run
        try:
            begun = {row.ids[0] == first for row in texts.rows(given, model.tokenizer, model.prepend_bos)}
        except PromptError:
            return any_text
    if first is None or any_text != OWN or begun == {False}:
        return any_text
    told = f"{model.to_strings([first])[0]!r} (in the texts)"
    return told if begun == {True} else f"{told}, or {OWN}"


def _of_ids(model: Opened, ids: Tensor, mask: Tensor | None) -> str:
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.is_floating_point():
        return ""
    columns = (mask.long().argmax(-1) if mask is not None else ids.new_zeros(len(ids))).to(ids.device)
    first = set(ids.gather(1, columns[:, None])[:, 0].tolist())
    if len(first) > 1 or not first <= _special(model):
        return OWN if model.tokenizer is not None else "not known: there is no tokenizer"
    return f"{model.to_strings(first)[0]!r} (in the token ids)"


def _special(model: Opened) -> set[int]:
    known = {getattr(model.tokenizer, f"{kind}_token_id", None) for kind in ("bos", "cls")}
    return {token for token in known if token is not None}
