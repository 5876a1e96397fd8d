"""`token_id` and `class_id`: the token or the class that a user gives as a word or a number."""

from __future__ import annotations

from torch import Tensor

from headwater.lens.errors import PromptError, nearest
from headwater.lens.models.opened import Opened
from headwater.lens.naming.texts import encoding


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
