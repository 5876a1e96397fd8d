"""Words behind a prompt: what a model must be told of them beside their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headwater.lens.naming.tokens import Tokens, is_of_tokens


def types_mark_written(hf: Any) -> bool:
    """Whether `token_type_ids` tell the prompt, read in both directions, from what is written (PaliGemma)."""
    return getattr(hf.config, "model_type", "") == "paligemma"


def written_behind(hf: Any, prompt: Tokens, ids: Sequence[int]) -> Tokens:
    """A prompt of one row with words behind it, as if the model had written them.

    It sees the same pictures from there as at its last token, and no word sees a later one.
    """
    new = torch.tensor([list(ids)], dtype=torch.long, device=prompt.device)
    more = {
        name: torch.cat([value, _of_new(hf, name, value, len(ids))], 1)
        if is_of_tokens(name, value, prompt.shape)
        else value
        for name, value in prompt.more.items()
    }
    mask = torch.cat([prompt.mask, torch.ones_like(new, dtype=torch.bool)], 1)
    return Tokens(torch.cat([prompt.ids, new], 1), mask, more, None, prompt.owners)


def _of_new(hf: Any, name: str, value: Tensor, count: int) -> Tensor:
    if name == "cross_attention_mask":
        return value[:, -1:].expand(-1, count, *value.shape[2:])
    new = value.new_zeros(1, count, *value.shape[2:])
    return new + 1 if name == "token_type_ids" and types_mark_written(hf) else new
