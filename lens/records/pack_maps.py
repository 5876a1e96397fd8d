"""Pack attention maps into JSON data and named tensors, and unpack them: score rule, mask, edits, normaliser, patterns.

Unpacking creates only the classes listed here, only from fields of the declared types, and checks all shapes against
the map before it is used. A mask or an edit that is a Python function can not be packed: RecordError names it. Tensors
that several layers share (masks, position biases) are written once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from headwater.kernels.edits.patterns import Pattern
from headwater.kernels.edits.scores import ScoreEdit
from headwater.kernels.edits.weights import RowCondition, WeightEdit, WeightStep
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.mixers.convolution import ConvolutionMap
from headwater.kernels.mixers.recurrence import RecurrenceMap
from headwater.kernels.rules.fits import check_fit
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.pair_rules import Rule
from headwater.lens.errors import RecordError
from headwater.lens.mixers.effective_map import EffectiveMap

GROUPS = {
    "ScoreEdit": get_args(ScoreEdit),
    "WeightEdit": get_args(WeightEdit),
    "Pattern": get_args(Pattern),
    "BlockReader": (AttentionMap,),
    # a mask that only a function describes is no data
    "IndexMask": get_args(Rule),
    "MixerMap": (RecurrenceMap, ConvolutionMap),
}
SINGLE = (Mask, Normaliser, AttentionMap, ScoreRule, RowCondition, WeightStep, EffectiveMap)
KINDS: dict[str, type] = {c.__name__: c for c in (*SINGLE, *(c for group in GROUPS.values() for c in group))}
# not saved: the backend, which each machine chooses, `known`, which can be computed again, and what the record says
LEFT_OUT = {"AttentionMap": ("backend", "known"), "EffectiveMap": ("provenance",)}
PLAIN = {"bool": bool, "int": int, "float": int | float, "str": str}
DEEPEST = 24
Add = Callable[[str, Tensor], None]


class Packer:
    """Packs maps; `add(name, tensor)` is called once for each tensor, with the name that the packed data holds."""

    def __init__(self, add: Add) -> None:
        self._add = add
        # holds the tensors: a freed one could give its address, which is the key here, to another
        self._shared: dict[tuple, tuple[str, Tensor]] = {}

    def pack(self, map: AttentionMap | EffectiveMap, name: str) -> dict[str, Any]:
        """The map as JSON data; RecordError if a part of it is a Python function."""
        return self._item(map, name)

    def _item(self, item: Any, name: str) -> dict[str, Any]:
        kind = type(item).__name__
        if KINDS.get(kind) is not type(item):
            raise RecordError(
                f"{kind} can not be written to a file; record with keep=() to save the statistics"
            )
        left_out = LEFT_OUT.get(kind, ())
        fields = {
            field.name: self._value(getattr(item, field.name), f"{name}.{field.name}", kind)
            for field in dataclasses.fields(item)
            if field.name not in left_out
        }
        return {"type": kind, **{n: v for n, v in fields.items() if v is not None}}

    def _value(self, value: Any, name: str, owner: str) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, name)}
        if isinstance(value, tuple):
            return [self._value(each, f"{name}.{i}", owner) for i, each in enumerate(value)]
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise RecordError(f"{owner}: {name.rpartition('.')[2]} is {value} and can not be written")
            return value
        if dataclasses.is_dataclass(value):
            return self._item(value, name)
        raise RecordError(
            f"the {owner.lower()} of this model or edit is given by a function and can not be written to a file; "
            "record with keep=() to save the statistics"
        )

    def _tensor(self, tensor: Tensor, name: str) -> str:
        if name.endswith((".q", ".k", ".lse")) and ".pattern." not in name:
            self._add(name, tensor)
            return name
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
        if key not in self._shared:
            self._shared[key] = name, tensor
            self._add(name, tensor)
        return self._shared[key][0]


def on_device(item: Any, device: torch.device) -> Any:
    """A map, or a part of one, with all its tensors on a device."""
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, tuple):
        return tuple(on_device(each, device) for each in item)
    if type(item) in KINDS.values():
        moved = {
            field.name: on_device(getattr(item, field.name), device) for field in dataclasses.fields(item)
        }
        return dataclasses.replace(item, **moved)
    return item


def unpack(packed: Any, tensors: dict[str, Tensor]) -> AttentionMap:
    """The packed map; KeyError, TypeError or ValueError for data that is not a map."""
    map = _unpacked(packed, tensors, 0)
    if not isinstance(map, AttentionMap):
        raise ValueError(f"a map was expected, found {type(map).__name__}")
    check(map)
    return map


def unpack_effective(packed: Any, tensors: dict[str, Tensor]) -> EffectiveMap:
    """The packed map of a layer without softmax attention; errors as in `unpack`."""
    found = _unpacked(packed, tensors, 0)
    if not isinstance(found, EffectiveMap):
        raise ValueError(f"an effective map was expected, found {type(found).__name__}")
    map = found.map
    batch, heads, length, _ = found.values.shape
    shapes: list[tuple[str, Tensor | None, tuple[int | None, ...]]] = [
        ("values", found.values, (batch, heads, length, None)),
        ("skip", found.skip, (heads,)), ("offset", found.offset, (heads,)),
        ("output", found.output, (batch, length, None)),
    ]  # fmt: skip
    if isinstance(map, RecurrenceMap):
        _, groups, _, state = map.q.shape
        if not groups or heads % groups or map.log_decay.shape[-1] not in (1, state):
            raise ValueError(f"{heads} heads in {groups} groups with a state of {state}")
        shapes += [
            ("q", map.q, (batch, groups, length, state)), ("k", map.k, (batch, groups, length, state)),
            ("log_decay", map.log_decay, (batch, heads, length, None)), ("write", map.write, (batch, heads, length)),
            ("rates", map.rates, (heads, state)),
        ]  # fmt: skip
    elif isinstance(map, ConvolutionMap):
        shapes.append(("taps", map.taps, (heads, None)))
        if (map.batch, map.length) != (batch, length):
            raise ValueError(f"a convolution over {map.batch} × {map.length}")
    for name, value, shape in shapes:
        if value is not None and not (
            value.is_floating_point()
            and value.dim() == len(shape)
            and all(m > 0 if n is None else n == m for n, m in zip(shape, value.shape, strict=True))
        ):
            raise ValueError(f"{name} of an effective map is {list(value.shape)}")
    return found


def _unpacked(packed: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError("an edit within an edit within an edit …")
    if isinstance(packed, list):
        return tuple(_unpacked(each, tensors, depth + 1) for each in packed)
    if not isinstance(packed, dict):
        return packed
    if set(packed) == {"tensor"}:
        return tensors[packed["tensor"]]
    kind = KINDS[packed["type"]]
    known = {
        field.name: str(field.type)
        for field in dataclasses.fields(kind)
        if field.name not in LEFT_OUT.get(kind.__name__, ())
    }
    values = {name: _unpacked(value, tensors, depth + 1) for name, value in packed.items() if name != "type"}
    for name, value in values.items():
        if name not in known or not _fits(value, known[name]):
            raise ValueError(f"{kind.__name__} with {name} = {str(value)[:40]}")
    return kind(**values)


def _fits(value: Any, declared: str) -> bool:
    """Whether a value has the declared type of a field, such as `tuple[ScoreEdit, ...]` or `int | None`."""
    words = set(re.findall(r"\w+", declared))
    if isinstance(value, tuple):
        return "tuple" in words and all(_fits(each, declared) for each in value)
    if value is None or isinstance(value, Tensor):
        return type(value).__name__.removesuffix("Type") in words
    if isinstance(value, bool):
        return "bool" in words
    if isinstance(value, int | float | str):
        return any(
            word in words and isinstance(value, kind) for word, kind in PLAIN.items() if word != "bool"
        )
    allowed = {kind for word in words for kind in GROUPS.get(word, ())}
    return type(value) in allowed or type(value).__name__ in words


def check(map: AttentionMap) -> None:
    """ValueError if the shapes in a map do not fit each other."""
    q, k, rule = map.q, map.k, map.rule
    if q.dim() != 4 or k.dim() != 4 or not q.is_floating_point() or q.dtype != k.dtype or 0 in q.shape:
        raise ValueError(f"queries {list(q.shape)} and keys {list(k.shape)} do not belong together")
    batch, heads, queries, keys = map.shape
    if len(k) != batch or not k.shape[1] or heads % k.shape[1] or k.shape[3] != q.shape[3]:
        raise ValueError(f"queries {list(q.shape)} and keys {list(k.shape)} do not belong together")
    if (rule.mask.queries, rule.mask.keys) != (queries, keys) or not _like(map.lse, (batch, heads, queries)):
        raise ValueError(f"a mask of {rule.mask.queries} × {rule.mask.keys} or rows {list(map.lse.shape)}")
    rows = {"queries": queries, "rows": queries, "valid_queries": queries}
    columns = dict.fromkeys(("keys", "to", "of", "within", "valid_keys"), keys)
    widths = {"heads": heads, **rows, **columns}
    parts: list[Any] = [rule.mask, *rule.edits, *(step.edit for step in map.steps)]
    parts += [edit.condition for edit in parts if getattr(edit, "condition", None) is not None]
    for part in parts:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor) and field.name in widths:
                leading = value.shape[:-1]
                fits = value.dtype == torch.bool and value.shape[-1:] == (widths[field.name],)
                if not fits or len(leading) > 2 or any(n not in (1, batch, heads) for n in leading):
                    raise ValueError(f"{type(part).__name__}: {field.name} is {list(value.shape)}")
            elif isinstance(value, Tensor) and field.name == "bias" and value.shape[-1] != keys:
                raise ValueError(f"{type(part).__name__}: bias is {list(value.shape)}")
    of_queries = rule.sinks is not None and rule.sinks.dim() > 1
    sinks = (batch, heads, queries) if of_queries else (heads,)
    for name, value, shape in (("sinks", rule.sinks, sinks), ("alibi", rule.alibi, (heads,))):
        if value is not None and not _like(value, shape):
            raise ValueError(f"{name} of {list(value.shape)} for {heads} heads")
    if rule.bias is not None and (
        rule.bias.dim() != 4 or any(n not in (1, m) for n, m in zip(rule.bias.shape, map.shape, strict=True))
    ):
        raise ValueError(f"a bias of {list(rule.bias.shape)}")
    for step in map.steps:
        if not all(_like(factor, (batch, heads, queries)) for factor in step.factors):
            raise ValueError(f"{type(step.edit).__name__} with factors of another shape")
    check_fit(q, k, k, rule, [step.edit for step in map.steps])
    map.tile(slice(0, 1), slice(0, 1))


def _like(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.is_floating_point() and tuple(tensor.shape) == shape
