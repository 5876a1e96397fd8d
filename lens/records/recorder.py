"""`Recorder`: the listener that computes and keeps what a record needs of each layer, while the model runs.

The tensors stay on the model's device, go to the CPU, or are written to a file layer by layer and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.kernels.maps import statistics as kernel
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import RecordError, nearest
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.models.axes import TEXTS, counted
from headwater.lens.models.opened import Opened
from headwater.lens.naming import positions
from headwater.lens.naming.heads import Head, Layers, chosen_layers
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records import held_maps
from headwater.lens.records.fit import misfit
from headwater.lens.records.pack_maps import on_device
from headwater.lens.records.provenance import provenance
from headwater.lens.records.record import Record, stack
from headwater.lens.records.save_open import RecordWriter

LEVELS = ("qk", "qkv", "residual", "mixers")


class _Waiting(NamedTuple):
    """A layer whose statistics are computed with those of others; the rest is what is kept of it."""

    layer: int
    map: AttentionMap
    kept: AttentionMap | None
    value: Tensor | None


class Recorder:
    """Listener for one part of a model. `tokens` are its queries, `keys` its keys; they differ in cross-attention.

    `device` (None: the model's) or `writer` say where the tensors go. With `grad` they keep their graph.
    """

    def __init__(
        self, model: Opened, tokens: Tokens, keys: Tokens, statistics: Iterable[str], layers: Layers,
        keep: Iterable[str], groups: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        self.model = model.key
        self.source = model
        self.tokens, self.keys = tokens, keys
        self.statistics = (statistics,) if isinstance(statistics, str) else tuple(statistics)
        unknown = [name for name in self.statistics if name not in kernel.NAMES]
        if unknown:
            raise RecordError(f"unknown statistic {unknown[0]!r}: {nearest(unknown[0], kernel.NAMES)}")
        self.layers = sorted(set(chosen_layers(layers, model.layers)))
        if not self.layers:
            raise RecordError("no layer is chosen; use layers='all' or a list of layers")
        self._chosen = set(self.layers)
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        if (
            len(set(self.keep)) != len(self.keep)
            or not set(self.keep) <= set(LEVELS)
            or {"qk", "qkv"} <= set(self.keep)
        ):
            raise RecordError(
                "keep must be (), or 'qk' or 'qkv' and with it, or alone, 'residual' and 'mixers'; got "
                f"{self.keep!r}"
            )
        self.groups = {str(n): key_positions(p, tokens) for n, p in (groups or {}).items()}
        if "mass" in self.statistics and not self.groups:
            raise RecordError("the statistic 'mass' needs groups={'name': positions}")
        self.device: torch.device | None = None
        self.tell: Callable[[], object] = lambda: None  # called after each layer
        self.grad = False
        self.writer: RecordWriter | None = None
        self._waiting: list[_Waiting] = []
        self._came: set[int] = set()  # layers that are kept
        # statistics [batch, layer, head, …] of the layers that are named beside them
        self._found: list[tuple[list[int], dict[str, Tensor]]] = []
        self._maps: dict[int, AttentionMap] = {}
        self._values: dict[int, Tensor] = {}
        self._residuals: dict[int | str, Tensor] = {}
        self.effective: dict[int, EffectiveMap] = {}

    @property
    def keeps_maps(self) -> bool:
        return "qk" in self.keep or "qkv" in self.keep

    @property
    def keeps_residuals(self) -> bool:
        return "residual" in self.keep and not self.source.parts[self.source.part_name].crosses

    @property
    def keeps_mixers(self) -> bool:
        return "mixers" in self.keep and bool(self.source.mixers)

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        if layer not in self._chosen:
            refuse_overflow(layer, map)
            return
        first, count = (self._waiting[0].map if self._waiting else None), len(self._waiting)
        again = first is not None and held_maps.repeats(map, first, count)
        self._number_anew(map)
        if not again and "entropy" in self.statistics and map.signed:
            raise RecordError(
                f"the weights of layer {layer} may be negative, so 'entropy' is not defined; leave it out: "
                "statistics=('received', 'max', …)"
            )
        kept = None
        if self.keeps_maps:
            # q and k may be views of larger tensors, which a view would keep in memory
            kept = AttentionMap(
                map.q.contiguous(), map.k.contiguous(), map.rule, map.lse, map.steps, map.backend
            )
        values = None
        if "qkv" in self.keep:
            values = (value if self.grad else value.detach()).contiguous()
        waiting = _Waiting(layer, map, kept, values)
        waits = again or (not self.grad and held_maps.waits(map))
        if first is not None and not again and not (waits and held_maps.fits(map, first, count)):
            self._measure()
        self._waiting.append(waiting)
        if not waits:
            self._measure()
        self.tell()

    def _measure(self) -> None:
        """Keep the layers that wait, with their statistics."""
        layers, self._waiting = self._waiting, []
        if not layers:
            return
        maps, groups = [each.map for each in layers], stack(self.groups)
        together = maps[0] if len(maps) == 1 else held_maps.beside(maps)
        if bool(together.lse.isnan().any()):
            for each in layers:
                refuse_overflow(each.layer, each.map)
        found, shape = held_maps.apart(together.statistics(self.statistics, groups), len(maps)), self._shape()
        for n, each in enumerate(layers):
            # those of all have one shape, and only a file wants them one by one
            some = found if n == 0 or self.writer is not None else {}
            self._hold(each.layer, {name: x[:, n] for name, x in some.items()}, each.kept, each.value, shape)
        if self.writer is None:
            self._found.append(([each.layer for each in layers], found))

    def put(
        self, layer: int, statistics: dict[str, Tensor], map: AttentionMap | None, value: Tensor | None
    ) -> None:
        """Keep one layer: on the device, or in the file. RecordError where it does not fit the tokens."""
        self._hold(layer, statistics, map, value, self._shape())
        if self.writer is None:
            self._found.append(([layer], {name: values[:, None] for name, values in statistics.items()}))

    def _hold(
        self, layer: int, statistics: dict[str, Tensor], map: AttentionMap | None, value: Tensor | None,
        shape: tuple[int, int, int, int],
    ) -> None:  # fmt: skip
        if told := misfit(shape, len(self.groups), statistics, map, value):
            raise RecordError(
                f"layer {layer} of {self.source.name} ({self.source.part_name}) gave {told}, so it is not known which "
                "token is which; nothing was recorded"
            )
        self._came.add(layer)
        if self.writer is not None:
            statistics = {name: values.contiguous() for name, values in statistics.items()}
            self.writer.layer(layer, statistics, map, value)
            return
        if map is not None:
            self._maps[layer] = map if self.device is None else on_device(map, self.device)
        if value is not None:
            self._values[layer] = value if self.device is None else value.to(self.device)

    def _shape(self) -> tuple[int, int, int, int]:
        """Batch, head, query and key of the maps that fit the tokens."""
        keys = self.keys if self.source.parts[self.source.part_name].crosses else self.tokens
        return len(self.tokens.ids), self.source.n_heads, self.tokens.ids.shape[1], keys.ids.shape[1]

    def _number_anew(self, map: AttentionMap) -> None:
        """Number the tokens of images, audio and learned queries as the first map has them, if that is not as planned.

        They are then not told apart by place or kind.
        """
        if self.was_called:
            return
        part = self.source.parts[self.source.part_name]
        batch, _, queries, keys = map.shape
        if part.queries not in TEXTS and self.tokens.ids.shape != (batch, queries):
            self.tokens = counted(batch, queries)
        if part.keys not in TEXTS and self.keys.ids.shape != (batch, keys):
            self.keys = counted(batch, keys)

    def take_residual(self, place: int | str, stream: Tensor) -> None:
        if place != "final" and place not in self.layers:
            return
        if self.writer is not None:
            self.writer.residual(place, stream)
            return
        # a block may change its input in place
        stream = (stream if self.grad else stream.detach()).clone()
        self._residuals[place] = stream if self.device is None else stream.to(self.device)

    @property
    def was_called(self) -> bool:
        """True once a layer has given its map to this recorder."""
        return bool(self._came or self._waiting)

    def finish(self, first: str) -> Record:
        """The record without names of tokens; tensors that were written to a file are not in it.

        `first` is the token with which its text begins, in words (models/beginning.py).
        """
        self._measure()
        missing = [layer for layer in self.layers if layer not in self._came]
        if missing:
            raise RecordError(
                f"layers {missing} did not call Headwater's attention, so nothing was recorded of them; leave them "
                "out of layers="
            )
        model = self.source
        statistics = self._of_all_layers() if self.writer is None else {}
        told = provenance(model, first=first)
        effective = {layer: replace(each, provenance=told) for layer, each in self.effective.items()}
        if self.device is not None:
            effective = {layer: on_device(each, self.device) for layer, each in effective.items()}
        ids, valid = self.tokens.ids.cpu(), self.tokens.mask.cpu()
        return Record(
            ids, valid, [], self.layers, model.n_heads, model.causal, statistics, self._maps, self._values,
            self.groups, told, residuals=self._residuals, effective=effective,
        )  # fmt: skip

    def _of_all_layers(self) -> dict[str, Tensor]:
        """The statistics [batch, layer, head, …], with the layers in their order."""
        place = {layer: n for n, layer in enumerate(one for layers, _ in self._found for one in layers)}
        order = [place[layer] for layer in self.layers]
        found = {}
        for name in self.statistics:
            parts = [statistics[name] for _, statistics in self._found]
            values = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            found[name] = values if order == list(range(values.shape[1])) else values[:, order]
        return found


def refuse_overflow(layer: int, map: AttentionMap) -> None:
    """RecordError if scores overflowed; the log-sum-exp of a row is NaN then."""
    bad = map.lse.isnan()
    if bad.any():
        row, head, query = bad.nonzero()[0].tolist()
        raise RecordError(
            f"attention scores are NaN or infinite, first in head {Head(layer, head)} at batch {row}, position "
            f"{query + map.rule.mask.query_offset}; the weights or the input hold values that overflow"
        )


def key_positions(given: Any, tokens: Tokens) -> Tensor:
    """Positions as a group of keys, bool [batch, position]; a bool tensor is returned as it is."""
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        return given
    named = positions.check(given, "groups")  # type: ignore[arg-type]
    picked = torch.zeros_like(tokens.mask, device="cpu")
    for row, real in enumerate(tokens.mask.cpu()):
        columns = real.nonzero()[:, 0]
        picked[row, columns[positions.of_row(named, len(columns))]] = True
    return picked
