"""Texts, sentence pairs and chat messages as rows of token ids, each with one beginning.

A prompt is one text, one pair of texts `("a", "b")`, one conversation `[{"role": "user", "content": "…"}]`, or a list
of these. The token that begins a text (BOS) is put by the tokenizer or by `prepend_bos`, and never twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.lens.errors import PromptError


@dataclass(frozen=True)
class Row:
    """Token ids of one prompt; `types` are its `token_type_ids`, None where they are all 0 or the tokenizer gives
    none."""

    ids: list[int]
    types: list[int] | None = None


def is_text(given: Any) -> bool:
    """Whether a prompt is made of text: texts, pairs of texts or chat messages, and no token ids."""
    return _is_one(given) or (isinstance(given, list | tuple) and bool(given) and all(map(_is_one, given)))


def is_single(given: Any) -> bool:
    """Whether this is one text, one pair or one conversation, and no list of them."""
    return _is_one(given)


def rows(
    given: Any, tokenizer: Any, prepend_bos: bool | None = None, generating: bool = False
) -> list[Row]:  # fmt: skip
    """Every prompt as token ids. PromptError for an empty one, or one that the tokenizer can not read.

    `prepend_bos`: True puts the token that begins a text where it is missing, False leaves out the one that the
    tokenizer puts, None does what the tokenizer does. A conversation goes through the tokenizer's chat template, which
    opens the answer when `generating`. A text that is written with a beginning keeps that one, with a warning where
    the tokenizer puts another.
    """
    each = [given] if _is_one(given) else list(given)
    if tokenizer is None:
        raise PromptError(
            "the model was loaded without a tokenizer; give token ids, or load(model, tokenizer=…)"
        )
    if prepend_bos and beginning(tokenizer) is None:
        raise PromptError("prepend_bos=True: the tokenizer has no token that begins a text; leave it out")
    _refuse_blank(each)
    return [_row(one, tokenizer, prepend_bos, generating) for one in each]


def beginning(tokenizer: Any) -> int | None:
    """The token that begins a text, such as "<s>" or "[CLS]"; None without one."""
    for kind in ("bos", "cls"):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is not None:
            return token
    return None


def check_choice(prepend_bos: Any, error: type[Exception]) -> None:
    """An `error` unless it is True, False or None: "no" would count as True."""
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise error(f"prepend_bos is True, False or None; got {short(prepend_bos)}")


def encoding(tokenizer: Any, *given: str, **options: Any) -> Any:
    """What the tokenizer makes of a text or of a pair of texts; PromptError for characters that no text has, such as
    broken bytes."""
    for text in given:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"{text!r:.60} is no text: character {error.start} is a broken byte or half a character; give UTF-8"
            ) from None
    return tokenizer(*given, **options)


def _is_one(given: Any) -> bool:
    return isinstance(given, str) or _is_pair(given) or _is_chat(given)


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(text, str) for text in given)


def _is_chat(given: Any) -> bool:
    messages = isinstance(given, list | tuple) and bool(given)
    return messages and all(isinstance(one, Mapping) and "role" in one for one in given)


def _refuse_blank(each: Sequence[Any]) -> None:
    blank = [i for i, one in enumerate(each) if not _is_chat(one) and not "".join(one).strip()]
    if blank:
        where = "" if len(each) == 1 else f" (number {', '.join(str(i + 1) for i in blank)} of {len(each)})"
        raise PromptError(f"the prompt is empty{where}; write some text")


def _row(given: Any, tokenizer: Any, prepend_bos: bool | None, generating: bool) -> Row:
    if _is_chat(given):
        ids = _templated(given, tokenizer, generating)
        return Row(_begun(ids, None, tokenizer, prepend_bos))
    both = given if _is_pair(given) else (given,)
    found = encoding(tokenizer, *both, add_special_tokens=True)
    ids = list(found["input_ids"])
    types = found.get("token_type_ids") if hasattr(found, "get") else None
    types = list(types) if types is not None and any(types) else None
    if _is_pair(given) and types is None and not _tells_apart(tokenizer):
        raise PromptError(
            f"{short(given)} is a pair of texts, and the tokenizer puts nothing between them; "
            "give a list for two prompts, or join the texts"
        )
    if not ids:
        raise PromptError(f"the tokenizer makes no token of {short(given)}")
    begun = _begun(ids, both[0], tokenizer, prepend_bos)
    if types is not None:
        more = len(begun) - len(ids)
        types = [types[0]] * more + types if more >= 0 else types[-more:]
    return Row(begun, types)


def _tells_apart(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a token between the two texts of a pair."""
    count = tokenizer.num_special_tokens_to_add
    return count(pair=True) > count(pair=False)


def _templated(messages: Any, tokenizer: Any, generating: bool) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError("the tokenizer has no chat template; write the conversation as one text")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generating)
    except Exception as error:  # a template may raise anything
        raise PromptError(
            f"the chat template does not take these messages ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); give a list such as [{{'role': 'user', 'content': 'Hello'}}]"
        ) from None
    return list(encoding(tokenizer, text, add_special_tokens=False)["input_ids"])


def _begun(ids: list[int], text: str | None, tokenizer: Any, prepend_bos: bool | None) -> list[int]:
    """`ids` with one beginning, or none where it is neither wanted nor written; `text` is None for a conversation."""
    first = beginning(tokenizer)
    if first is None:
        return ids
    count = next((n for n, token in enumerate(ids) if token != first), len(ids))
    word = str(tokenizer.bos_token if first == tokenizer.bos_token_id else tokenizer.cls_token)
    written = text is not None and text.lstrip().startswith(word)
    if written and count > 1:
        warnings.warn(
            f"the text begins with {word!r}, and the tokenizer puts another before it; one is kept",
            stacklevel=2,
        )
        ids, count = ids[count - 1 :], 1
    if prepend_bos and not count:
        return [first, *ids]
    if prepend_bos is False and not written:
        return ids[count:]
    return ids


def short(value: Any) -> str:
    """A value as text of at most 60 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
