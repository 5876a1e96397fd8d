"""Masks from transformers, translated into the kernels' `Mask` instead of being built as tensors.

transformers composes a mask from small functions of (batch, head, query, key) indices. The known ones become numbers:
causal, bidirectional and sliding window become a band, Llama 4's chunks become documents. Any other function is kept,
and the kernels call it tile by tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from headwater.kernels.repeated import Repeated
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import IndexMask, Mask
from headwater.kernels.tiles.pair_rules import Listed
from headwater.lens.errors import ModelError

# tensor methods that only inspect a mask; "__get__" is attribute access: shape, device, dtype
ASKED = (
    "__get__", "as_subclass", "dim", "size", "is_floating_point", "is_contiguous", "get_device",
    "__repr__", "__hash__",
)  # fmt: skip


class LazyMask(Tensor):
    """A stand-in for the 4-D attention mask: shape and type of a tensor, but it stores only the `Mask` description.

    transformers passes a 4-D mask tensor on unchanged, which generation with a static cache relies on. The last queries
    may be cut out of it (Gemma 4 computes no others in layers that share keys). What a model adds to it is kept as the
    bias of the scores (BEiT). Repeated for each head, for attention outside of the interface, it becomes a tensor
    (SigLIP 2). Other arithmetic would lose the description, so it raises ModelError.
    """

    mask: Mask
    bias: Tensor | None = None
    # what a layer of a pass asked for, and what it found out for those that ask for the same (alike.py)
    alike: tuple[Any, Repeated | None] | None = None

    def __new__(cls, mask: Mask, batch: int, device: Any = None) -> LazyMask:
        nothing = torch.zeros(1, dtype=torch.bool, device=device)
        found = nothing.expand(batch, 1, mask.queries, mask.keys).as_subclass(cls)
        found.mask = mask
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("contiguous", "to", "detach", "clone", "cuda", "cpu"):
            return args[0]
        if name == "add" and (summed := _with_bias(args)) is not None:
            return summed
        if name == "repeat":
            return _dense(args[0]).repeat(*args[1:])
        if (
            name == "__getitem__"
            and args[0].bias is None
            and (last := _last_queries(args[0].mask, args[1])) is not None
        ):
            return args[0] if last is args[0].mask else cls(last, args[0].shape[0], args[0].device)
        if name in ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name == "_is_view":  # torch.compile calls this on every tensor it traces
            raise ModelError("torch.compile can not trace a model that Headwater reads; run it uncompiled")
        raise ModelError(
            f"the model computes with its attention mask ({name}) before attending; this architecture can not be read"
        )


def _with_bias(terms: Any) -> LazyMask | None:
    """The sum of a mask and a tensor of scores; None for any other sum."""
    given = next(term for term in terms if isinstance(term, LazyMask))
    other = next((term for term in terms if term is not given), None)
    if not isinstance(other, Tensor) or isinstance(other, LazyMask) or not other.is_floating_point():
        return None
    found = LazyMask(given.mask, given.shape[0], given.device)
    found.bias = other if given.bias is None else given.bias + other
    return found


def _dense(given: LazyMask) -> Tensor:
    """Which pairs are visible, bool [batch, 1, query, key]."""
    mask = given.mask
    block = Block(
        slice(0, given.shape[0]), torch.zeros(1).long(), slice(0, mask.queries), slice(0, mask.keys)
    )
    tile = mask.tile(block, given.device)
    shown = torch.ones((), dtype=torch.bool, device=given.device) if tile is None else tile
    return shown.expand(given.shape[0], 1, mask.queries, mask.keys)


def _last_queries(mask: Mask, index: Any) -> Mask | None:
    """The mask that `index` cuts out of a 4-D mask: all of it, or its last queries; None for any other index."""
    if not isinstance(index, tuple) or not all(
        isinstance(part, slice) and part.step is None for part in index
    ):
        return None
    sizes = (None, None, mask.queries, mask.keys)[: len(index)]
    begin = 0
    for axis, (part, size) in enumerate(zip(index, sizes, strict=False)):
        start, stop, _ = part.indices(size or 1)
        if axis == 2:
            begin = start
        elif start:
            return None
        if part.stop is not None and (size is None or stop < size):
            return None
    if len(index) > len(sizes) or begin >= mask.queries:
        return None
    rows = mask.valid_queries
    return mask if begin == 0 else replace(
        mask, queries=mask.queries - begin, query_offset=mask.query_offset + begin,
        valid_queries=None if rows is None else rows[:, begin:],
    )  # fmt: skip


@torch.compiler.disable  # a compiled call would replay the mask of the run that was traced
def lazy_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int | Tensor = 0,
    mask_function: Callable = masking_utils.causal_mask_function, attention_mask: Tensor | None = None,
    device: Any = None, **_: Any,
) -> LazyMask:  # fmt: skip
    """The mask as transformers asks for it; `attention_mask` is [batch, positions so far], True on real tokens."""
    q_offset, kv_offset = int(q_offset), int(kv_offset)
    longest = max(q_offset + q_length, kv_offset + kv_length)
    left, right, documents, extra = band(mask_function, longest)
    if extra is not None:
        extra = _every(extra)
    valid_keys = valid_queries = start = stop = None
    if attention_mask is not None:
        real = attention_mask.bool().cpu()
        padded = torch.nn.functional.pad(real, (0, max(kv_offset + kv_length - real.shape[1], 0)))
        valid_keys = padded[:, kv_offset : kv_offset + kv_length]
        # in cross-attention `attention_mask` covers the keys only (lengths differ): then every query counts as real
        if q_offset + q_length <= real.shape[1] and (right is not None or q_length == kv_length):
            valid_queries = real[:, q_offset : q_offset + q_length]
        if not real.all():
            start = real.long().argmax(-1)
            stop = real.shape[1] - real.flip(-1).long().argmax(-1)
        valid_keys = None if valid_keys.all() else valid_keys
        valid_queries = None if valid_queries is None or valid_queries.all() else valid_queries
    mask = Mask(
        q_length, kv_length, left, right, q_offset, kv_offset, valid_keys, valid_queries, extra,
        start, stop, documents,
    )  # fmt: skip
    return LazyMask(mask, batch_size, device)


def given_mask(given: Tensor, queries: int) -> tuple[Mask, Tensor | None]:
    """A mask that came as a tensor [batch|1, head|1, query|1, key]: what it hides, and what it adds to scores.

    It is bool, True where visible, or numbers to add, of which the least hide. What it hides becomes a band or padding
    where it is no more than that.
    """
    keys = given.shape[-1]
    shown = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
    bias = None
    if given.dtype != torch.bool and bool((shown & (given != 0)).any()):
        bias = given.masked_fill(~shown, float("-inf"))
    if bool(shown.all()):
        return Mask(queries, keys), bias
    if shown.shape[1:3] == (1, 1):
        return Mask(queries, keys, valid_keys=shown[:, 0, 0].cpu()), bias
    square = shown.shape[2] == queries == keys
    band = torch.ones(queries, keys, dtype=torch.bool, device=shown.device).tril() if square else None
    if band is None or bool((shown & ~band).any()):
        right = None
    elif shown.equal(band.expand_as(shown)):
        return Mask(queries, keys, right=0), bias
    else:
        right = 0
    return Mask(queries, keys, right=right, extra=Listed(torch.zeros(2, 1, dtype=torch.long), shown)), bias


def as_lazy(given: Tensor | None, batch: int, queries: int, keys: int, device: Any) -> LazyMask | Tensor:
    """The description of a causal mask with padding that a model made as a tensor [batch|1, head|1, query, key]; the
    tensor itself where it is another one. None: all earlier keys. The last query sees every real key."""
    real = shown = None
    if given is not None:
        given = given[:, :1, :, :keys]
        shown = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
        real = shown[:, 0, -1].expand(batch, keys)
    made: Any = lazy_mask
    described = made(batch, queries, keys, keys - queries, attention_mask=real, device=device)
    if shown is None or bool((_dense(described) == shown).all()):
        return described
    return shown


def crossing(mask: Mask, own: Mask) -> Mask:
    """The mask of cross-attention with the query positions and padding of `own`, the decoder's self-attention mask.

    transformers describes only the keys of cross-attention.
    """
    start, stop = own.real("query")
    return replace(
        mask,
        query_offset=own.query_offset,
        valid_queries=own.valid_queries,
        query_start=start,
        query_stop=stop,
    )


def band(function: Callable, length: int) -> tuple[int | None, int | None, Tensor | None, IndexMask | None]:
    """A mask function as (`left`, `right`, documents of `length` positions, the rest as an index function).

    The band is compared with the function on sampled pairs, the documents on the row of the last position. Where they
    disagree the whole function is the rest.
    """
    left: int | None = None
    right: int | None = None
    documents: Tensor | None = None
    rest: list[Callable] = []
    for part in _parts(function):
        limits = _limits(part)
        if limits is None:
            found = _documents(part, length) if documents is None else None
            documents = documents if found is None else found
            rest += [part] if found is None else []
            continue
        left = _tighter(left, limits[0])
        right = _tighter(right, limits[1])
    if not rest and documents is None and not _agrees(function, left, right):
        return None, None, None, function
    return left, right, documents, masking_utils.and_masks(*rest) if rest else None


def _parts(function: Callable) -> list[Callable]:
    """The functions that transformers' `and_masks` joined; the function itself where it is not a conjunction."""
    if getattr(function, "__qualname__", "") == "and_masks.<locals>.and_mask":
        inner = inspect.getclosurevars(function).nonlocals["mask_functions"]
        return [part for one in inner for part in _parts(one)]
    return [function]


def _limits(function: Callable) -> tuple[int | None, int | None] | None:
    """(left, right) of a mask function that is known by name; None for any other."""
    if function is masking_utils.causal_mask_function:
        return None, 0
    if function is masking_utils.bidirectional_mask_function:
        return None, None
    name = getattr(function, "__qualname__", "")
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return inspect.getclosurevars(function).nonlocals["sliding_window"] - 1, None
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        window = inspect.getclosurevars(function).nonlocals["sliding_window"]
        return window, window
    return None


def _documents(function: Callable, length: int) -> Tensor | None:
    """The chunk number of each position, int64 [batch|1, position], for Llama 4's chunked mask; None for any other."""
    if getattr(function, "__qualname__", "") != "chunked_overlay.<locals>.inner_mask":
        return None
    known = inspect.getclosurevars(function).nonlocals
    padding: Tensor = known["left_padding"].cpu()
    places = torch.arange(length)
    found = (places - padding[:, None]) // known["chunk_size"]
    rows = torch.arange(len(padding))[:, None].to(known["left_padding"].device)
    seen = function(rows, 0, length - 1, places.to(rows.device)).cpu()
    if not seen.equal(found == found[:, -1:]):
        return None
    return found[:1] if found.equal(found[:1].expand_as(found)) else found


def _tighter(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _agrees(function: Callable, left: int | None, right: int | None) -> bool:
    """Whether the band gives what the function gives, around its edges.

    Guards against a transformers release that changes the meaning of a known name.
    """
    edges = {0, 1, *(abs(n) + d for n in (left or 0, right or 0) for d in (-1, 0, 1))}
    distance = torch.tensor(sorted({s * e for e in edges for s in (-1, 1)}))
    query = torch.full_like(distance, 2 * int(distance.abs().max()) + 2)
    key = query + distance
    zero = torch.zeros_like(query)
    expected = torch.ones_like(query, dtype=torch.bool)
    if right is not None:
        expected &= distance <= right
    if left is not None:
        expected &= -distance <= left
    return bool((function(zero, zero, query, key).expand_as(expected) == expected).all())


def _every(function: Callable) -> IndexMask:
    """A mask function of transformers as the kernels call it: over index tensors that broadcast."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return function(batch, torch.zeros_like(head[:, :1]), query, key)

    return visible
