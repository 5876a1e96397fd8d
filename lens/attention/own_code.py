"""Attention that transformers' own code computes outside of its attention interface: BLOOM, MPT, Falcon, Swin v2.

While a model runs, functions stand in for its attention modules in the caller's context (standing_in.py). Each makes
queries, keys and values as the module does and hands them to the attention function (function.py), with what ALiBi
(Press et al. 2022) adds to scores: a slope times the key's position, one number for each head and key, so that nothing
of queries × keys is built. Which positions are padding is read from the mask that the model made. Windows of pictures
become one map of the grid (windows.py).

Two hooks on the model put the functions on and take them off. They know nothing of the model, so copies and pickles
of it keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from headwater.lens.attention.function import attention
from headwater.lens.attention.masks import as_lazy
from headwater.lens.attention.module_hooks import stay_around, take_off
from headwater.lens.attention.standing_in import standing_in

_running: ContextVar[tuple[ExitStack, ...]] = ContextVar("headwater_own_code", default=())


def _bloom(
    module: Any, hidden: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None,
    layer_past: Any = None, **_: Any,
) -> tuple[Tensor, None] | None:  # fmt: skip
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return None
    q, k, v = module._reshape(module.query_key_value(hidden))
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    bias = alibi.view(len(q), module.num_heads, 1, -1)
    z = _attended(module, (q, k, v), attention_mask, module.inv_norm_factor, bias)
    return residual + module.dense(z), None


def _mpt(
    module: Any, hidden: Tensor, position_bias: Tensor | None, past_key_values: Any = None,
    attention_mask: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None] | None:  # fmt: skip
    mixed = module.Wqkv(hidden)
    if module.clip_qkv:
        mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv)
    q, k, v = (each.unflatten(2, (module.n_heads, -1)).transpose(1, 2) for each in mixed.chunk(3, dim=2))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, module.layer_idx)
    if position_bias is not None and position_bias.shape[-1] < k.shape[2]:
        return None  # longer than the model reads, which its own code says
    bias = None if position_bias is None else position_bias[None, ..., -k.shape[2] :]
    shown = None if attention_mask is None else ~attention_mask
    return module.out_proj(_attended(module, (q, k, v), shown, module.softmax_scale, bias)), None


def _falcon(
    module: Any, hidden: Tensor, alibi: Tensor | None, attention_mask: Tensor | None, position_ids: Any = None,
    layer_past: Any = None, use_cache: bool = False, output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    q, k, v = (each.transpose(1, 2) for each in module._split_heads(module.query_key_value(hidden)))
    if alibi is None:
        assert position_embeddings is not None
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    if module.new_decoder_architecture:  # keys and values come repeated for each query head
        group = module.num_heads // module.num_kv_heads
        k, v = k[:, ::group], v[:, ::group]
    bias = None
    if alibi is not None:
        # the mask holds ALiBi too, and the eager code adds both
        times = 1 if module.config._attn_implementation == "sdpa" and not output_attentions else 2
        bias = alibi.view(len(q), module.num_heads, 1, -1) * (times / math.sqrt(module.head_dim))
    return module.dense(_attended(module, (q, k, v), attention_mask, module.inv_norm_factor, bias)), None


def _swin_v2(
    module: Any, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any
) -> tuple[Tensor, None]:
    """Cosine attention (Liu et al. 2022): the queries carry the learned scale of their head."""
    q, k, v = _by_head(module, hidden)
    scale = module.logit_scale.clamp(max=math.log(100.0)).exp()
    table = module.continuous_position_bias_mlp(module.relative_coords_table).flatten(0, -2)
    bias = 16 * table[module.relative_position_index].permute(2, 0, 1).sigmoid()
    hides = None if attention_mask is None else 2 * attention_mask  # transformers adds its mask twice
    q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    return _in_windows(module, (q, k, v), bias, hides, 1.0), None


def _swin(module: Any, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any) -> tuple[Tensor, None]:
    bias = module.relative_position_bias_table[module.relative_position_index].permute(2, 0, 1)
    scale = module.attention_head_size**-0.5
    return _in_windows(module, _by_head(module, hidden), bias, attention_mask, scale), None


def _by_head(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        linear(hidden).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for linear in (module.query, module.key, module.value)
    )
    return q, k, v


def _in_windows(
    module: nn.Module, qkv: Sequence[Tensor], bias: Tensor, hides: Tensor | None, scale: float
) -> Tensor:
    """z of all heads side by side, [batch · window, place, head · d_value]; `bias` [head, place, place] and `hides`
    [window, place, place] are added to scores."""
    added = bias[None]
    if hides is not None:
        added = (bias + hides[:, None]).repeat(len(qkv[0]) // len(hides), 1, 1, 1)
    attend: Any = attention
    return attend(module, *qkv, added, scale)[0].flatten(2)


FORMS: dict[tuple[str, str], Callable[..., Any]] = {
    ("bloom", "BloomAttention"): _bloom,
    ("mpt", "MptAttention"): _mpt,
    ("falcon", "FalconAttention"): _falcon,
    ("swinv2", "Swinv2SelfAttention"): _swin_v2,
    ("donut", "DonutSwinSelfAttention"): _swin,
}


def _attended(
    module: nn.Module, qkv: Sequence[Tensor], mask: Tensor | None, scale: float, bias: Tensor | None
) -> Tensor:
    """z of all heads side by side, [batch, query, head · d_value]; `mask` hides no more than later keys and padding."""
    q, k, v = qkv
    seen = as_lazy(mask, len(q), q.shape[2], k.shape[2], q.device)
    attend: Any = attention
    return attend(module, q, k, v, seen, scale, position_bias=bias)[0].flatten(2)


def _stand_ins(hf: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    found = {}
    for module in hf.modules():
        kind = type(module)
        home = kind.__module__.split(".")
        form = FORMS.get((home[-2], kind.__name__)) if home[0] == "transformers" and home[1:] else None
        if form is not None:
            found[module] = partial(_in_eval, form, module)
    return found


def _in_eval(form: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return None if module.training else form(module, *args, **kwargs)


class _Enter:
    def __call__(self, hf: nn.Module, args: Any) -> None:
        stack = ExitStack()
        stack.enter_context(standing_in(_stand_ins(hf)))
        _running.set((*_running.get(), stack))


class _Leave:
    def __call__(self, hf: nn.Module, args: Any, output: Any) -> None:
        *others, last = _running.get()
        _running.set(tuple(others))
        last.close()


def known(hf: nn.Module) -> bool:
    """Whether functions can stand in for attention modules of this model."""
    return bool(_stand_ins(hf))


def is_met(hf: nn.Module) -> bool:
    """Whether they do when it runs."""
    return any(isinstance(hook, _Enter) for hook in hf._forward_pre_hooks.values())


def meet(hf: nn.Module) -> None:
    """From now on the attention of this model is Headwater's while it runs."""
    if not is_met(hf):
        stay_around(hf, _Enter(), _Leave())


def part_from(hf: nn.Module) -> None:
    """Undo `meet`."""
    take_off(hf, (_Enter, _Leave))
