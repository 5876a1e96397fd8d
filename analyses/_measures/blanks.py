"""The token that replaces a removed token, and the scores of texts with such blanks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch, outputs_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.token_ids import token_id

BlankSetting = Annotated[str | None, "token that takes a token's place; none: the mask or the unknown token"]


def blank_id(model: HookedModel, blank: str | None) -> int:
    """The blank's id: as named, else [MASK] of a bidirectional model, else unknown, pad or end of text."""
    if blank is not None:
        return token_id(model, blank, "blank")
    names = ("unk_token_id", "pad_token_id", "eos_token_id")
    names = names if model.causal else ("mask_token_id", *names)
    known = (getattr(model.tokenizer, name, None) for name in names)
    found = next((one for one in known if one is not None and 0 <= one < model.vocab), None)
    if found is None:
        raise AnalysisError(f"{model.name} has no token for a blank; name one, e.g. blank='#0' for token 0")
    return found


def blanked(ids: Tensor, gone: Tensor, blank: int) -> Tensor:
    """`ids` [position] with the blank where `gone` [form, position] is true: [form, position]."""
    return torch.where(gone, blank, ids.expand(len(gone), -1))


def answers(
    model: HookedModel, batch: Batch, value: Callable[[Tensor, Tensor], Tensor], forms: Tensor, size: int
) -> Tensor:
    """The score of each form [text, form, position] of the texts of a batch, float64 [text, form]."""
    outputs = outputs_of(model)
    count, each, length = forms.shape
    rows = forms.reshape(-1, length)
    texts = torch.arange(count).repeat_interleave(each)
    found = [
        value(outputs(batch.rows(some, rows[i : i + size])), some).double().cpu()
        for i in range(0, len(rows), size)
        for some in [texts[i : i + size]]
    ]
    return torch.cat(found).view(count, each)
