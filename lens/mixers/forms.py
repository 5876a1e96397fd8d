"""What the functions that transformers' layers call for their recurrence compute, as a map and its values.

A layer without softmax attention prepares queries, keys, decays and values and hands them to one function: a chunked
delta rule, a scan, a convolution. Each `Form` here is made from the arguments of such a call. `give` turns the inner
output into what the function returns, so that the layer's own code can go on with it. `take` reads the result of the
function itself when it is called with the arguments `without`: no skip, no gate, no bias, so only what the map does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers.activations import ACT2FN

from headwater.kernels.mixers.convolution import ConvolutionMap
from headwater.kernels.mixers.mixer_map import MixerMap
from headwater.kernels.mixers.recurrence import RecurrenceMap
from headwater.lens.errors import ModelError
from headwater.lens.mixers.effective_map import inner

Arguments = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Form:
    """A map [batch, head, position, position], values [batch, head, position, c], and what is added beside."""

    kind: str
    map: MixerMap
    values: Tensor
    skip: Tensor | None
    offset: Tensor | None
    give: Callable[[Tensor], Any]
    take: Callable[[Any], Tensor]
    without: tuple[str, ...] = ()

    def answer(self) -> Any:
        """What the function returns, computed from the map."""
        return self.give(inner(self.map, self.values, self.skip, self.offset))


def gated_delta_rule(given: Arguments) -> Form:
    """Queries, keys and values [batch, position, head, d], g = log decay [batch, position, head(, d)], beta."""
    _fresh(given, "initial_state")
    query, key, value, beta, decay = (_heads(given[n]) for n in ("query", "key", "value", "beta", "g"))
    if given.get("use_qk_l2norm_in_kernel"):
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    decay = decay[..., None] if decay.dim() == 3 else decay
    map = RecurrenceMap(query * query.shape[-1] ** -0.5, key, decay, beta, delta=True)
    return Form(
        "gated delta rule", map, value, None, None,
        lambda out: (out.transpose(1, 2).contiguous().to(given["value"].dtype), None),
        lambda found: found[0].transpose(1, 2),
    )  # fmt: skip


def state_space_by_head(given: Arguments) -> Form:
    """Mamba-2: x [batch, position, head, c], dt [batch, position, head], A [head], B, C [batch, position, group, n]."""
    _fresh(given, "initial_states")
    step = given["dt"]
    step = step if given.get("dt_bias") is None else step + given["dt_bias"].to(step)
    step = _full(softplus(step) if given.get("dt_softplus") else step)
    step = step.clamp(*(given.get("dt_limit") or (0.0, float("inf"))))
    map = RecurrenceMap(
        _heads(given["C"]), _heads(given["B"]), _heads(step * _full(given["A"]))[..., None], _heads(step)
    )

    def give(out: Tensor) -> Any:
        out = out.transpose(1, 2).contiguous()
        out = out if given.get("z") is None else out * silu(_full(given["z"]))
        return (out, None) if given.get("return_final_states") else out

    skip = given.get("D")
    skip = None if skip is None else _full(skip)
    values = _heads(given["hidden_states"])
    return Form(
        "selective state space", map, values, skip, None, give, lambda found: _first(found).transpose(1, 2), ("D", "z")
    )  # fmt: skip


def state_space_by_channel(given: Arguments) -> Form:
    """Mamba-1: x and dt [batch, channel, position], A [channel, n], B and C [batch, n, position]."""
    x = given["hidden_states"]
    step = given["dt"]
    step = step if given.get("delta_bias") is None else step + given["delta_bias"].to(step)[:, None]
    step = _full(softplus(step) if given.get("delta_softplus") else step)
    reads, writes = (_full(given[n]).mT[:, None] for n in ("C", "B"))
    map = RecurrenceMap(reads, writes, -step[..., None], step, rates=-_full(given["A"]))

    def give(out: Tensor) -> Any:
        scanned = out[..., 0].to(x.dtype)
        scanned = scanned if given.get("z") is None else scanned * silu(given["z"])
        return (scanned, None) if given.get("return_last_state") else scanned

    skip = given.get("D")
    skip = None if skip is None else _full(skip)
    return Form(
        "selective state space", map, _full(x)[..., None], skip, None, give,
        lambda found: _first(found)[..., None], ("D", "z"),
    )  # fmt: skip


def short_convolution(given: Arguments) -> Form:
    """x [batch, channel, position], weight [channel, tap]."""
    x, bias, activation = given["hidden_states"], given.get("bias"), given.get("activation")
    map = ConvolutionMap(_full(given["weight"]), len(x), x.shape[-1])

    def give(out: Tensor) -> Tensor:
        return (out[..., 0] if activation is None else ACT2FN[activation](out[..., 0])).to(x.dtype)

    return Form(
        "short convolution", map, _full(x)[..., None], None, None if bias is None else _full(bias), give,
        lambda found: found[..., None], ("bias", "activation"),
    )  # fmt: skip


def real_gated_lru(given: Arguments) -> Form:
    """RG-LRU: x and its decay [batch, position, channel]; `reset` where a text begins."""
    _fresh(given, "recurrent_states")
    x = given["hidden_states"]
    decay = (_full(given["recurrent_gate"]) * ~given["reset"]).mT[..., None]
    ones = torch.ones_like(decay[:, :1])
    map = RecurrenceMap(ones, ones, decay.log(), torch.ones_like(decay[..., 0]))
    return Form(
        "RG-LRU", map, _full(x).mT[..., None], None, None, lambda out: (out[..., 0].mT.to(x.dtype), None),
        lambda found: found[0].mT[..., None],
    )  # fmt: skip


def lightning_attention(query: Tensor, key: Tensor, value: Tensor, slope: Tensor) -> Form:
    """Queries, keys and values [batch, head, position, d]; a head decays by exp(-slope) a position."""
    batch, heads, length, _ = query.shape
    decay = -_full(slope).reshape(1, heads, 1, 1).expand(batch, heads, length, 1)
    map = RecurrenceMap(_full(query), _full(key), decay, torch.ones_like(decay[..., 0]))
    return Form(
        "linear attention", map, _full(value), None, None,
        lambda out: out.transpose(1, 2).reshape(batch, length, -1).to(value.dtype),
        lambda found: found.reshape(batch, length, heads, -1).transpose(1, 2),
    )  # fmt: skip


def joined(forms: Sequence[Form]) -> Form:
    """The calls of one layer that calls its function for some of its channels at a time."""
    if len(forms) == 1:
        return forms[0]
    maps = [form.map for form in forms if isinstance(form.map, RecurrenceMap)]
    if len(maps) < len(forms) or any(m.rates is None or m.delta for m in maps):
        raise ModelError("it calls its recurrence more than once")
    q, k, decay, write = (
        torch.cat([getattr(m, n) for m in maps], 1) for n in ("q", "k", "log_decay", "write")
    )
    rates = torch.cat([m.rates for m in maps if m.rates is not None])
    skips = [form.skip for form in forms if form.skip is not None]
    values = torch.cat([form.values for form in forms], 1)
    map = RecurrenceMap(q, k, decay, write, rates=rates)
    return Form(
        forms[0].kind, map, values, torch.cat(skips) if skips else None, None, forms[0].give, forms[0].take
    )


def _full(x: Tensor) -> Tensor:
    """In float32 at least: recurrences are computed so, whatever the layer's dtype."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _heads(x: Tensor) -> Tensor:
    """[batch, position, head, …] as [batch, head, position, …]."""
    return _full(x).transpose(1, 2)


def _first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


def _fresh(given: Arguments, state: str) -> None:
    if given.get(state) is not None and bool(given[state].any()):
        raise ModelError("it goes on from a state of an earlier run; run without a cache")
