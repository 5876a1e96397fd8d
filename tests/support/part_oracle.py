"""Dense float64 attention for models of several parts: every call's weights by module path, and edits of scores.

It shares no code with Headwater: masks come from transformers' eager mask function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "part_oracle"


@dataclass
class PartOracle:
    """`maps[path]`: weights [batch, head, query, key] of each call; `scores(path, call, s)` edits what makes them."""

    scores: Callable[[str, int, Tensor], Tensor] = lambda path, call, s: s
    maps: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    paths: dict[torch.nn.Module, str] = field(default_factory=dict)

    def run(self, model: PreTrainedModel, call: Callable[[PreTrainedModel], object]) -> object:
        """`call(model)` with this oracle for its attention."""
        self.paths = {module: path for path, module in model.named_modules()}
        model.set_attn_implementation(NAME)
        _running.append(self)
        try:
            with torch.no_grad():
                return call(model)
        finally:
            _running.pop()


_running: list[PartOracle] = []


def _attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **_
):
    oracle = _running[-1]
    path = oracle.paths[module]
    group = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = (query.shape[-1] ** -0.5 if scaling is None else scaling) * query.double() @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias.double()[..., : scores.shape[-1]]
    scores = oracle.scores(path, len(oracle.maps[path]), scores)
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask[..., : key.shape[2]] < -1e30, -torch.inf)
    full = scores
    if s_aux is not None:
        full = torch.cat([scores, s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = full.softmax(-1).nan_to_num(0.0)[..., : scores.shape[-1]]
    oracle.maps[path].append(weights)
    return (weights @ v).transpose(1, 2).to(value.dtype).contiguous(), None


def _mask(*args, **kwargs):
    return eager_mask(
        *args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
