"""One call of `scaled_dot_product_attention`, read as Headwater's attention takes it.

torch takes tensors [..., head, position, d_head] with any number of leading axes, masks that broadcast, true or float,
and a causal flag whose diagonal begins at the first key. Here every call becomes q, k, v [row, head, position, d_head],
a `Mask` and a bias. A key that a mask hides from every query is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.pair_rules import Listed
from headwater.lens.errors import ModelError

HIDDEN = float("-inf")
FROM_0 = torch.zeros(2, 1, dtype=torch.long)  # masks of a call count from its first position


@dataclass(frozen=True, eq=False)
class Call:
    """q [row, head, query, d_head], k and v [row, key head, key, d], what the mask hides, [row|1, head|1, query|1, key]
    (None: nothing), the bias beside it, whether a mask came at all, and the shape of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None
    bias: Tensor | None
    masked: bool
    causal: bool
    scale: float
    shape: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.q.shape[2], self.k.shape[2]

    def padding(self) -> Tensor | None:
        """The keys that no query sees, bool [row, key]; None without any."""
        if self.hidden is None:
            return None
        gone = self.hidden.all(2).all(1)
        return gone.expand(len(self.q), self.lengths[1]).cpu() if gone.any() else None

    def mask(self, own: bool) -> Mask:
        """What the queries see; `own` says that queries and keys are the same tokens."""
        queries, keys = self.lengths
        right = 0 if self.causal else None
        gone, seen = self.padding(), None
        if self.hidden is not None:
            hidden = (
                self.hidden if gone is None else self.hidden & ~gone[:, None, None].to(self.hidden.device)
            )
            later = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device).triu(1)
            if gone is not None:
                later = later & ~gone[:, None, None].to(later.device)
            if hidden.any() and hidden.shape[2] == queries > 1 and bool((hidden == later).all()):
                right = 0
            elif hidden.any():
                seen = ~(self.hidden if gone is None or len(hidden) == len(self.hidden) else hidden)
        if gone is None:
            return Mask(queries, keys, right=right, extra=None if seen is None else Listed(FROM_0, seen))
        real = ~gone
        some = real.any(-1)
        start = torch.where(some, real.long().argmax(-1), 0)
        stop = torch.where(some, keys - real.flip(-1).long().argmax(-1), keys)
        return Mask(
            queries, keys, right=right, valid_keys=real, valid_queries=real if own and queries == keys else None,
            extra=None if seen is None else Listed(FROM_0, seen), start=start, stop=stop,
        )  # fmt: skip


def read(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, where: str, batch: int = 1,
) -> Call:  # fmt: skip
    """The arguments of `scaled_dot_product_attention` as a `Call`; `where` names the module in errors.

    Tensors of three axes are read as [batch · head, position, d_head] where their first axis is a multiple of `batch`.
    ModelError for dropout and for nested tensors.
    """
    if dropout_p:
        raise ModelError(
            f"{where} calls scaled_dot_product_attention with dropout_p={dropout_p:g} in eval mode too, so its "
            "attention is random; give 0 where the module is not training"
        )
    if any(each.is_nested for each in (query, key, value)):
        raise ModelError(
            f"{where} attends over nested tensors, which have no one length; pad them with a mask"
        )
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        query, key, value = (
            each.to(low) if each.dtype != torch.float64 else each for each in (query, key, value)
        )
    shape = (*query.shape[:-1], value.shape[-1])
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    if query.dim() == 3:
        heads = len(query) // batch if len(query) % batch == 0 else 1
        query, key, value = (_unfolded(each, len(query), heads) for each in (query, key, value))
        attn_mask = None if attn_mask is None else _unfolded_mask(attn_mask, len(query) * heads, heads)
    elif query.dim() == 2:
        query, key, value = (each[None, None] for each in (query, key, value))
    lead = torch.broadcast_shapes(*(each.shape[:-3] for each in (query, key, value)))
    heads = max(each.shape[-3] for each in (query, key, value))
    shape = (*lead, heads, *shape[-2:]) if len(shape) > 3 else shape
    q, k, v = (_rows(each, lead, each.shape[-3] if enable_gqa else heads) for each in (query, key, value))
    hidden = bias = None
    if attn_mask is not None:
        hidden, bias = _parted(_four_axes(attn_mask, lead, len(q)), k.shape[2])
    return Call(q, k, v, hidden, bias, attn_mask is not None, bool(is_causal), factor, shape)


def _rows(given: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """[…, head, position, d] with its leading axes as one."""
    return given.expand(*lead, heads, *given.shape[-2:]).reshape(-1, heads, *given.shape[-2:])


def _unfolded(given: Tensor, rows: int, heads: int) -> Tensor:
    """[batch · head, position, d] as [batch, head, position, d]; a first axis of 1 is shared by all."""
    given = given.expand(rows, *given.shape[1:]) if len(given) == 1 else given
    return given.reshape(-1, heads, *given.shape[1:])


def _unfolded_mask(mask: Tensor, folded: int, heads: int) -> Tensor:
    return mask.reshape(-1, heads, *mask.shape[1:]) if mask.dim() == 3 and len(mask) == folded > 1 else mask


def _four_axes(mask: Tensor, lead: tuple[int, ...], rows: int) -> Tensor:
    """A mask that broadcasts to [..., head, query, key] as [row|1, head|1, query|1, key|1]."""
    mask = mask[(None,) * max(len(lead) + 3 - mask.dim(), 0)]
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).reshape(rows, *mask.shape[-3:])


def _parted(mask: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """What a mask hides, on as few axes as it takes, and the bias on the other pairs; None for nothing."""
    mask = mask.expand(*mask.shape[:3], keys)
    if mask.dtype == torch.bool:
        hidden, bias = ~mask, None
    else:
        hidden = mask == HIDDEN
        low = mask <= torch.finfo(mask.dtype).min / 2
        hidden = hidden | (
            low & ~low.all(-1, keepdim=True)
        )  # a row of least numbers alone is even, not empty
        bias = mask.masked_fill(hidden, 0.0)
        bias = bias if bias.requires_grad or bias.any() else None
    if not hidden.any():
        return None, bias
    for axis in range(3):
        first = hidden.narrow(axis, 0, 1)
        if hidden.shape[axis] > 1 and bool((hidden == first).all()):
            hidden = first
    return hidden, bias
