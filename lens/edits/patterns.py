"""Edits that mix a pattern T into the weights: P → (1-amount)·P + amount·T.

T is normalised per row over the keys that the mask shows to the row; weights recorded from another run are used as they
are. A row in which T is zero keeps its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.kernels.edits import patterns, weights as kernel
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import SHARE, HeadWise, LayerCall, Prepared, Rows
from headwater.lens.edits.named_positions import NO_GROUPS
from headwater.lens.edits.weights import Toward
from headwater.lens.errors import EditError, nearest
from headwater.lens.models.opened import Opened
from headwater.lens.naming import positions
from headwater.lens.naming.heads import Heads, Layers
from headwater.lens.naming.positions import Positions
from headwater.lens.records.record import Record
from headwater.lens.running import ids as running

__all__ = ["FreezeAttention", "InjectPattern", "TowardUniform"]

OFFSETS = {"identity": 0, "previous": 1}
NAMES = (*OFFSETS, "uniform", "first", "matching")


@dataclass(frozen=True, eq=False)
class TowardUniform(Toward):
    """P → (1-amount)·P + amount/n over the n keys that the query sees; 0 changes nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.TowardUniform(0.6, heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0.1000, 0.1000, 0.1000, 0.5000, 0.1000, 0.1000])
    """

    def _lower(self, call: LayerCall) -> Lowered:
        return _mixed(call, self.amount, patterns.Uniform(), self.queries)


@dataclass(frozen=True, eq=False)
class InjectPattern(HeadWise, numbers={"amount": SHARE}, neutral={"amount": 0}):
    """Mix a given pattern into the weights (after human-guided pattern injection; only the paper's abstract was read).

    `pattern` is one of: "identity"; "previous"; "uniform"; "first", the first token; "matching", earlier tokens equal
    to the query's token, evenly; {"offset": n}, the key n before the query; {"keys": positions}, these keys evenly;
    weights [query, key] or [head, query, key], counted from the first real token; a record or its path, of which the
    same layer and head are used, as `FreezeAttention` does. `amount` 0 changes nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.InjectPattern("previous", heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0., 0., 0., 0., 1., 0.])
    """

    pattern: Any
    amount: float = 1.0
    heads: Heads = "all"
    layers: Layers = "all"
    queries: Positions = "all"
    rows: Rows = "all"

    @property
    def reads_tokens(self) -> bool:
        return isinstance(self.pattern, str) and self.pattern == "matching"

    @property
    def own_position(self) -> bool:  # type: ignore[override]
        by_rule = isinstance(self.pattern, Mapping) and set(self.pattern) == {"offset"}
        return by_rule or (isinstance(self.pattern, str) and self.pattern in (*OFFSETS, "matching"))

    def named_positions(self) -> list[Positions]:
        return [self.queries, *([self.pattern["keys"]] if self._on_keys else [])]

    @property
    def _on_keys(self) -> bool:
        return isinstance(self.pattern, Mapping) and set(self.pattern) == {"keys"}

    def _check(self) -> None:
        super()._check()
        if isinstance(self.pattern, Mapping):
            if set(self.pattern) == {"in_memory"}:
                raise EditError(
                    "InjectPattern: the record was in memory when the edit was written down; save it and give its path"
                )
            if not self._on_keys and set(self.pattern) != {"offset"}:
                raise EditError(
                    f"InjectPattern: a pattern by rule is {{'keys': positions}} or {{'offset': n}}; got "
                    f"{self.pattern!r}"
                )
            if self._on_keys:
                positions.check(self.pattern["keys"], "InjectPattern: keys")
            elif not isinstance(self.pattern["offset"], int) or isinstance(self.pattern["offset"], bool):
                raise EditError(
                    f"InjectPattern: offset must be a whole number; got {self.pattern['offset']!r}"
                )
        elif isinstance(self.pattern, str) and self.pattern not in NAMES and not _is_path(self.pattern):
            raise EditError(
                f"InjectPattern: unknown pattern {self.pattern!r}: {nearest(self.pattern, NAMES)}"
            )

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        prepared = super().prepare(model, groups)
        if isinstance(self.pattern, Record) or _is_path(self.pattern):
            return _with_record(prepared, self.pattern, model)
        if isinstance(self.pattern, str | Mapping):
            return prepared
        weights = _matrix(self.pattern, model.n_heads)
        return replace(prepared, values=dict.fromkeys(prepared.heads, weights))

    def _lower(self, call: LayerCall) -> Lowered:
        if isinstance(call.values, Record):
            found: patterns.Pattern = _of_record(call, "InjectPattern")
        elif isinstance(call.values, Tensor):
            found = patterns.Fixed(_from_first(call.values, call.mask))
        elif self.pattern == "first":
            found = patterns.OnKeys(call.keys(0))
        elif isinstance(self.pattern, Mapping) and self._on_keys:
            found = patterns.OnKeys(call.keys(self.pattern["keys"]))
        elif self.pattern == "uniform":
            found = patterns.Uniform()
        elif self.pattern == "matching":
            ids = running.current(call.names.model.key).ids
            if ids is None:
                raise EditError(
                    "InjectPattern('matching'): the token ids of this call are not known; call the model with token ids"
                )
            found = patterns.Matching(ids)
        else:
            offset = self.pattern["offset"] if isinstance(self.pattern, Mapping) else OFFSETS[self.pattern]
            found = patterns.Offset(offset)
        return _mixed(call, self.amount, found, self.queries)


@dataclass(frozen=True, eq=False)
class FreezeAttention(HeadWise, numbers={"amount": SHARE}, neutral={"amount": 0}):
    """Replace the weights by those of another run, at the same layers, heads and positions.

    `record` is a `Record` with maps, or the path of one. It must have the batch size, number of heads and window of
    this run, and no more tokens than its prompt. Rows after the last token of the record keep their weights. With
    `amount` below 1 both are mixed; 0 changes nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> other = model.record("John gave Mary a drink")
    >>> with model.edit(hw.FreezeAttention(other)):
    ...     frozen = model.record("Mary gave John a drink")
    >>> bool((frozen.pattern(2) - other.pattern(2)).abs().max() < 1e-5)
    True
    """

    record: Record | str = field(repr=False)
    amount: float = 1.0
    heads: Heads = "all"
    layers: Layers = "all"
    queries: Positions = "all"
    rows: Rows = "all"

    def _check(self) -> None:
        super()._check()
        if not isinstance(self.record, Record) and not isinstance(self.record, str):
            raise EditError(
                f"FreezeAttention takes a record or the path of one; got {self.record!r}; a record in memory must be "
                "saved before an edit with it is written down"
            )

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        return _with_record(super().prepare(model, groups), self.record, model)

    def _lower(self, call: LayerCall) -> Lowered:
        return _mixed(call, self.amount, _of_record(call, "FreezeAttention"), self.queries)


def _mixed(call: LayerCall, amount: float, pattern: patterns.Pattern, queries: Positions) -> Lowered:
    return Lowered(weights=(kernel.MixPattern(call.heads, float(amount), pattern, call.rows(queries)),))


def _is_path(given: Any) -> bool:
    return isinstance(given, str) and given.endswith(".safetensors")


def named_files(edit: Mapping[str, Any]) -> dict[str, str]:
    """The settings of an edit, given as a dict, that are paths of record files."""
    return {
        name: value
        for name, value in edit.items()
        if isinstance(value, str) and (name == "record" or _is_path(value))
    }


def _with_record(prepared: Prepared, given: Record | str, model: Opened) -> Prepared:
    """The prepared edit with its record, which is opened and must have the heads and layers that the edit uses."""
    record = given if isinstance(given, Record) else Record.open(given)
    if record.n_heads != model.n_heads:
        raise EditError(
            f"{type(prepared.edit).__name__}: the record has {record.n_heads} heads a layer, {model.name} has "
            f"{model.n_heads}; take a record of the same shape"
        )
    for layer in prepared.heads:
        record.map(layer)  # raises if the record lacks the layer or its maps
    return replace(prepared, values=dict.fromkeys(prepared.heads, record))


def _of_record(call: LayerCall, where: str) -> patterns.OfMap:
    map, mask = call.values.map(call.layer), call.mask
    other = map.rule.mask
    if map.shape[0] != call.batch:
        raise EditError(
            f"{where}: the record has {map.shape[0]} batch rows and this run {call.batch}; record as many"
        )
    if mask.query_offset == 0 and map.shape[2] > mask.queries:
        raise EditError(
            f"{where}: the record has {map.shape[2]} tokens and this run {mask.queries}; positions would not fit"
        )
    # with a single query the mask has no band to compare
    banded = mask.queries > 1 and map.shape[2] > 1
    if banded and (other.left, other.right) != (mask.left, mask.right):
        raise EditError(
            f"{where}: the record's mask sees another window than this model's layer {call.layer}; "
            "record it with this model"
        )
    begins, ends = (
        torch.broadcast_tensors(a, b) for a, b in zip(other.real("query"), mask.real("query"), strict=True)
    )
    # a single query may be a prompt of one token or a step of generation: equal offsets mean the same query
    whole = map.shape[2] == mask.queries and other.query_offset == mask.query_offset
    same_ends = not whole or ends[0].equal(ends[1])
    if not begins[0].equal(begins[1]) or not same_ends:
        raise EditError(f"{where}: the record's rows are padded otherwise than this run's; pad them alike")
    return patterns.OfMap(map)


def _matrix(given: Any, heads: int) -> Tensor:
    """The given weights as a checked tensor [1, head|1, query, key]."""
    try:
        array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError):
        raise EditError(
            "InjectPattern: a pattern is a name, a rule, a record, or weights [query, key]; got "
            f"{type(given).__name__}"
        ) from None
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[0] not in (1, heads)):
        raise EditError(
            f"InjectPattern: weights are [query, key] or [{heads} heads, query, key]; got {list(array.shape)}"
        )
    if not np.isfinite(array).all() or (array < 0).any():
        raise EditError(
            f"InjectPattern: weights must be finite and not negative; got {array.min():.3g} to {array.max():.3g}"
        )
    weights = torch.from_numpy(array)
    return weights[None, None] if weights.dim() == 2 else weights[None]


def _from_first(weights: Tensor, mask: Mask) -> Tensor:
    """Weights given from the first real token, shifted to absolute positions for each row [batch|1, …]."""
    start = mask.real("query")[0].tolist()
    if not any(start):
        return weights
    pad = torch.nn.functional.pad
    longest = max(start)
    return torch.cat([pad(weights, (n, longest - n, n, longest - n)) for n in start])
