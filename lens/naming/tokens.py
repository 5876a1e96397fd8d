"""`Tokens`: prompts as padded token ids, made from text, lists or tensors and checked before the model runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.naming import texts
from headwater.lens.naming.pair_mask import is_of_pairs, pair_mask


class Tokens(Tensor):
    """Token ids, int64 [batch, position], with `mask`, bool of the same shape: True on real tokens, False on padding.

    A subclass of Tensor, so that other libraries can use it. The result of any computation with it is a plain tensor
    without a mask; `ids` is the plain tensor itself. `more` holds the model's other inputs under transformers' names.
    `labels` says what is right for each example: class ids [batch], or token ids [batch, position] with -100 where
    nothing is asked; None where nobody said. `owners` gives the row of each entry of an input that has not one entry
    for each row, such as several images of one text; without it a lone row owns all entries.
    """

    mask: Tensor
    more: Mapping[str, Tensor]
    labels: Tensor | None
    owners: Mapping[str, Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls, ids: Tensor, mask: Tensor, more: Mapping[str, Tensor] | None = None, labels: Tensor | None = None,
        owners: Mapping[str, Tensor] | None = None,
    ) -> Tokens:  # fmt: skip
        found = ids.as_subclass(cls)
        found.mask, found.more, found.labels, found.owners = mask, more or {}, labels, owners or {}
        return found

    @property
    def ids(self) -> Tensor:
        return self.as_subclass(Tensor)

    def rows(self, which: Any, ids: Tensor | None = None) -> Tokens:
        """Some rows with all that belongs to them, in this order; `ids`, as many, stand in the place of theirs.

        PromptError where nobody knows which entries of an input belong to which row.
        """
        chosen = torch.arange(len(self))[which.cpu() if isinstance(which, Tensor) else which]
        more, owners = {}, {}
        for name, given in self.more.items():
            owner = self._owner(name, given)
            if owner is None:
                more[name] = given[which]
                continue
            entries = [(owner == row).nonzero()[:, 0] for row in chosen.tolist()]
            more[name] = given[torch.cat(entries).to(given.device)]
            owners[name] = torch.arange(len(entries)).repeat_interleave(torch.tensor([*map(len, entries)]))
        labels = None if self.labels is None else self.labels[which]
        return Tokens(self.ids[which] if ids is None else ids, self.mask[which], more, labels, owners)

    def _owner(self, name: str, given: Tensor) -> Tensor | None:
        """The row of each entry of an input, None where they are the rows themselves."""
        if name in self.owners:
            return self.owners[name].cpu()
        if len(given) == len(self):
            return None
        if len(self) == 1:
            return torch.zeros(len(given), dtype=torch.long)
        raise PromptError(
            f"{name} holds {len(given)} entries for {len(self)} rows, and nothing says whose they are; give the rows "
            "one by one"
        )

    def changed(self, ids: Tensor, mask: Tensor, more: Mapping[str, Tensor] | None = None) -> Tokens:
        """The same examples with other ids and mask, and other further inputs (None: the same ones)."""
        return Tokens(ids, mask, self.more if more is None else more, self.labels, self.owners)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Tokens, (self.ids, self.mask, self.more, self.labels, self.owners)

    def __deepcopy__(self, memo: Any) -> Tokens:
        more, owners = copy.deepcopy(self.more, memo), copy.deepcopy(self.owners, memo)
        return Tokens(self.ids.clone(), self.mask.clone(), more, copy.deepcopy(self.labels, memo), owners)


def is_of_tokens(name: str, given: Tensor, shape: torch.Size) -> bool:
    """Whether an input has one value, or one vector or box, for each token of a text [batch, position]."""
    several = name == "inputs_embeds" or (
        given.dim() > 2 and not given.is_floating_point() and "pixel" not in name
    )
    return given.shape == shape or (several and given.shape[:2] == shape)


def to_tokens(
    given: Any, tokenizer: Any, attention_mask: Any = None, side: Literal["left", "right"] = "right",
    prepend_bos: bool | None = None, generating: bool = False,
) -> Tokens:  # fmt: skip
    """Text (`naming/texts.py`), or integer ids ([position] or [batch, position]), as `Tokens`.

    Texts of unequal length are padded on `side`; `more` holds `token_type_ids` where the tokenizer tells the texts of a
    pair apart, and "attention_mask" where the mask is one of pairs (`naming/pair_mask.py`). PromptError for an empty
    prompt, or one that is none of these.
    """
    if isinstance(given, Tokens):
        return given
    if texts.is_text(given):
        if attention_mask is not None:
            raise PromptError("attention_mask belongs to token ids; for texts the padding is known")
        return _padded(texts.rows(given, tokenizer, prepend_bos, generating), pad_id(tokenizer), side)
    if isinstance(given, list | tuple) and any(isinstance(text, str) for text in given):
        raise PromptError("a list of prompts must hold only texts; got a mix of texts and other things")
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(
            f"a prompt is a text, a list of texts or token ids of equal length; got {texts.short(given)}"
        ) from None
    if ids.numel() == 0:
        raise PromptError("the prompt is empty; give at least one token")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise PromptError(f"token ids are integers [batch, position]; got {ids.dtype} {list(ids.shape)}")
    ids = (ids[None] if ids.dim() == 1 else ids).long()
    if is_of_pairs(attention_mask, tuple(ids.shape)):
        if generating:
            raise PromptError("a mask of pairs is for one run; generate under the edit hw.MaskPairs")
        more = {"attention_mask": pair_mask(attention_mask, tuple(ids.shape))}
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), more)
    if attention_mask is None:
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    try:
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(
            f"attention_mask is a tensor of 0 and 1; got {texts.short(attention_mask)}"
        ) from None
    if not ((mask == 0) | (mask == 1)).all():
        raise PromptError("attention_mask holds 1 for a token and 0 for padding, and nothing between")
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise PromptError(
            f"attention_mask must have the tokens' shape {list(ids.shape)}; got {list(mask.shape)}"
        )
    return Tokens(ids, mask.bool().to(ids.device))


def _padded(rows: list[texts.Row], filler: int, side: str) -> Tokens:
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), filler, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    types = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(longest - len(row.ids), None) if side == "left" else slice(0, len(row.ids))
        ids[i, span], mask[i, span] = torch.tensor(row.ids), True
        if row.types is not None:
            types[i, span] = torch.tensor(row.types)
    return Tokens(ids, mask, {"token_type_ids": types} if types.any() else None)


def pad_id(tokenizer: Any, vocab: int | None = None) -> int:
    """The token that fills rows up: the tokenizer's own, else the one that ends a text, else 0; below `vocab`."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((i for i in ids if i is not None and (vocab is None or i < vocab)), 0)


def check(tokens: Tokens, vocab: int, context: int | None, extra: int = 0) -> None:
    """Refuse ids outside of the vocabulary, rows without a real token, padding between real tokens, and rows that are
    longer than the context with `extra` tokens added."""
    if not _is_plain(tokens, vocab):
        _refuse_strange(tokens, vocab)
    longest = tokens.ids.shape[1] + extra
    if context is not None and longest > context:
        more = f" with {extra} new tokens" if extra else ""
        raise PromptError(
            f"the prompt has {tokens.ids.shape[1]} tokens{more}, the model's context is {context}; shorten it by "
            f"{longest - context}"
        )


def _is_plain(tokens: Tokens, vocab: int) -> bool:
    """Whether all tokens are real ones that the vocabulary has, as of most prompts."""
    if not tokens.ids.numel() or not bool(tokens.mask.all()):
        return False
    least, most = tokens.ids.aminmax()
    return int(least) >= 0 and int(most) < vocab


def _refuse_strange(tokens: Tokens, vocab: int) -> None:
    wrong = ((tokens.ids < 0) | (tokens.ids >= vocab)) & tokens.mask
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise PromptError(
            f"token id {int(tokens.ids[row, column])} at batch {row}, position {column} is outside of the vocabulary "
            f"(0 to {vocab - 1}): the model has no embedding for it; leave it out, or use this model's tokenizer"
        )
    counts = tokens.mask.sum(-1)
    if (counts == 0).any():
        raise PromptError(
            f"batch row {int((counts == 0).nonzero()[0])} has no real token: its attention_mask is all zero; "
            "leave the row out"
        )
    steps = tokens.mask.long().diff(dim=-1).abs().sum(-1)
    inner = (steps > 1) & ~((steps == 2) & ~tokens.mask[:, 0] & ~tokens.mask[:, -1])
    if inner.any():
        raise PromptError(
            f"the attention_mask of batch row {int(inner.nonzero()[0])} has a gap; padding may stand at the ends alone"
        )
