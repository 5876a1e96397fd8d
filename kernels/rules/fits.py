"""`check_fit` compares the shapes of queries, keys, values, score rule and edits before anything is computed.

The mask gives the numbers of queries and keys, `q` those of batch rows and heads. All other tensors must agree with
them, as tensors that broadcast by accident would give finite, wrong numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass

from torch import Tensor

from headwater.kernels.rules.rule import ScoreRule

# The shapes that a tensor field of an edit, its condition, its pattern or its mask may have, by the name of the field.
# "side" is one of query and key.
SHAPES = {
    "heads": ("head", "batch|1, head"),
    "queries": ("batch|1, query",),
    "keys": ("batch|1, key",),
    "head_keys": ("batch|1, head, key",),
    "to": ("batch|1, key",),
    "of": ("batch|1, key",),
    "within": ("batch|1, key",),
    "bias": ("batch|1, key", "batch|1, head|1, key"),
    "rows": ("batch|1, head|1, query",),
    "ids": ("batch|1, any",),
    "weights": ("batch|1, head|1, any, any",),
    "mix": ("batch|1, head, head",),
    "of_query": ("batch|1, query, head, head",),
    "of_key": ("batch|1, key, head, head",),
    "kernel": ("batch|1, head, any, any",),
    "starts": ("side, batch|1",),
    "document": ("any",),
    "below": ("any, any",),
    "shown": ("any, any", "batch|1, head|1, any, any"),
    "chosen": ("batch, head, query, any",),
}


def check_fit(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[object] = ()) -> None:
    """ValueError with names and numbers where a shape does not fit.

    `q` [batch, head, query, d_head], `k` [batch, kv head, key, d_head], `v` [batch, kv head, key, d_value].
    """
    if q.dim() != 4:
        raise ValueError(f"q must be [batch, head, query, d_head]; got {list(q.shape)}")
    batch, heads, _, width = q.shape
    sizes = {"batch": batch, "head": heads, "query": rule.mask.queries, "key": rule.mask.keys, "side": 2}
    kv_heads = k.shape[1] if k.dim() == 4 else -1
    fits = q.shape[2] == sizes["query"] and k.shape == (batch, kv_heads, sizes["key"], width)
    if not fits or v.shape != (*k.shape[:3], v.shape[-1]):
        known = sizes | {"kv head": kv_heads, "d_head": width}
        _hold("q", q, ("batch, head, query, d_head",), known)
        _hold("k", k, ("batch, kv head, key, d_head",), known)
        _hold("v", v, ("batch, kv head, key, any",), known)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads and k {kv_heads}; the heads of q must be a multiple of those of k"
        )
    mask = rule.mask
    for name, given, forms in (
        ("sinks", rule.sinks, ("head", "batch|1, head, query|1")),
        ("bias", rule.bias, ("batch|1, head|1, query|1, key|1",)),
        ("alibi", rule.alibi, ("head",)),
        ("mask.valid_keys", mask.valid_keys, ("batch|1, any",)),
        ("mask.valid_queries", mask.valid_queries, ("batch|1, any",)),
        ("mask.documents", mask.documents, ("batch|1, any",)),
    ):
        if given is not None:
            _hold(name, given, forms, sizes)
    if mask.extra is None and not rule.edits and not edits:
        return
    for edit in (mask.extra, *rule.edits, *edits):
        for name, tensor in _tensors(edit):
            if name not in SHAPES:
                raise TypeError(
                    f"{type(edit).__name__}.{name}: add its shape to SHAPES in kernels/rules/fits.py"
                )
            _hold(f"{type(edit).__name__}.{name}", tensor, SHAPES[name], sizes)


def _hold(name: str, given: Tensor, forms: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    if any(_fits(given, form, sizes) for form in forms):
        return
    wanted = " or ".join(
        f"[{form}] = [{', '.join(_number(axis, sizes) for axis in form.split(', '))}]" for form in forms
    )
    raise ValueError(f"{name} must be {wanted}; got {list(given.shape)}")


def _fits(given: Tensor, form: str, sizes: Mapping[str, int]) -> bool:
    axes = _axes(form)
    if given.dim() != len(axes):
        return False
    return all(
        axis == "any" or size == sizes[axis] or (spreads and size == 1)
        for (axis, spreads), size in zip(axes, given.shape, strict=True)
    )


@functools.cache
def _axes(form: str) -> tuple[tuple[str, bool], ...]:
    """The axes of a form, and whether each of them may be 1; this is asked for every layer of every pass."""
    return tuple((axis.removesuffix("|1"), axis.endswith("|1")) for axis in form.split(", "))


def _number(axis: str, sizes: Mapping[str, int]) -> str:
    return (
        axis if axis == "any" else axis.replace(axis.removesuffix("|1"), str(sizes[axis.removesuffix("|1")]))
    )


def _tensors(edit: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an edit by the name of their field, those of its condition, pattern and mask too."""
    if not is_dataclass(edit):
        return
    for field in fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif field.name in ("condition", "pattern", "visible"):
            yield from _tensors(value)
