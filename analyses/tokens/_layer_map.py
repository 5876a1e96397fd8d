"""One map per layer from its heads and the residual stream: the maps that rollout and flow follow.

`Ã = rownorm((1 - w)·Ā + w·I)`, where `Ā` is the mean of the heads (plain or weighted) or their largest or smallest
weights. A row without any weight keeps its own position when w > 0, and is undefined (NaN) otherwise.

A layer without softmax attention has an exact map too (lens/mixers/effective_map.py), signed and without row sums of 1.
With `mixers="effective"` its `Ā` is the mean over heads, or channels, of `|A_ij| / Σ_j |A_ij|`.

With `without="sinks"` the columns of the sinks (`_sinks_aside.py`) are 0 in every `Ā`, before rows are divided by their
sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._streams.between_layers import refuse_mixers
from headwater.analyses.tokens._sinks_aside import Without, kept_keys, one_token, set_aside, sinks_of
from headwater.lens.errors import AnalysisError
from headwater.lens.models.stack import named
from headwater.lens.records.record import Record

Reduction = Literal["mean", "max", "min"]
Mixers = Literal["refuse", "effective"]
EXTREMES: dict[str, Callable[..., Tensor]] = {"max": torch.amax, "min": torch.amin}
EFFECTIVE = "effective"  # the mixing of a layer without softmax attention

INSTEAD = (
    'record with keep=("qk", "mixers") and give mixers="effective" to follow their exact maps, or read layers one by '
    "one (raw_attention, attention_distance)"
)


@dataclass(frozen=True, eq=False)
class Joining:
    """How the heads of `layers` are joined: `weight` is the residual stream's w, `mixing` of each layer the name of a
    reduction, "effective", or head weights [head] that sum to 1. `kept` is 1 for the keys that count and 0 for sinks
    set aside, [batch, key]; None where all count.
    """

    layers: list[int]
    weight: float
    mixing: list[str | Tensor]
    kept: Tensor | None = None

    def one_token(
        self, record: Record, shares: np.ndarray, columns: Tensor, keys: Tensor | None = None
    ) -> dict[str, str]:
        """What a result [batch, query, key] of these maps says where one token holds nearly all of it."""
        sinks = partial(sinks_of, record, self.layers)
        return one_token(record, record.causal, shares, columns, keys, self.kept, sinks)

    @classmethod
    def of(
        cls, record: Record, residual: float, heads: Reduction | Sequence[Sequence[float]], add_residual: bool,
        last_layer: int | None, mixers: Mixers, without: Without = None,
    ) -> Joining:  # fmt: skip
        if mixers == "refuse":
            refuse_mixers(
                record.provenance.get("model"),
                record.mixers,
                "a product of maps",
                high=last_layer,
                instead=INSTEAD,
            )
        between = _mixed(record, last_layer) if mixers == "effective" else []
        layers = consecutive_layers(record, last_layer, between)
        attending = [layer for layer in layers if layer not in between]
        of_heads = head_mixing(heads, attending, record.n_heads)
        mixing = [
            EFFECTIVE if layer in between
            else of_heads if isinstance(of_heads, str)
            else of_heads[attending.index(layer)]
            for layer in layers
        ]  # fmt: skip
        kept = kept_keys(record, layers) if without == "sinks" else None
        return cls(layers, residual if add_residual else 0.0, mixing, kept)


def attributes(record: Record, joining: Joining) -> dict[str, Any]:
    """What a result says of its layers, of the sinks set aside, and of what is left uncovered where mixers count by
    their exact maps."""
    told: dict[str, Any] = {"layers": joining.layers}
    if joining.kept is not None:
        told["set_aside"] = set_aside(record, joining.kept)
    if EFFECTIVE in [mixing for mixing in joining.mixing if isinstance(mixing, str)]:
        followed = named(record.mixers)
        left = [text for text in record.provenance.get("not_covered", ()) if text not in followed]
        told["not_covered"] = "; ".join(left)
    return told


def _mixed(record: Record, last: int | None) -> list[int]:
    """The layers up to `last` without softmax attention, whose maps the record must hold."""
    layers = [mixer.layer for mixer in record.mixers if last is None or mixer.layer <= last]
    attending = record.provenance.get("attention_layers", record.layers)
    both = [layer for layer in layers if layer in attending or layers.count(layer) > 1]
    if both:
        raise AnalysisError(
            f"layer {both[0]} of {record.provenance.get('model')} holds attention and a mixer, or two mixers, and a "
            "product takes one map a layer; read them one by one with record.map and record.effective_map"
        )
    for layer in layers:
        record.effective_map(layer)
    return layers


def consecutive_layers(record: Record, last: int | None, between: Sequence[int] = ()) -> list[int]:
    """The record's layers and those `between`, up to `last`. AnalysisError where one in between is missing or has
    signed weights that no `between` allows."""
    layers = sorted([*(n for n in record.layers if last is None or n <= last), *between])
    if not layers or (last is not None and layers[-1] != last):
        raise AnalysisError(f"last_layer={last} is not in this record; it has layers {record.layers}")
    known = record.provenance.get("attention_layers", range(layers[-1]))
    gap = [layer for layer in known if layers[0] < layer < layers[-1] and layer not in layers]
    if gap:
        raise AnalysisError(
            f"layer {gap[0]} is missing from this record; layers are followed one into the next"
        )
    signed = [layer for layer in layers if layer in record.maps and record.maps[layer].signed]
    if signed:
        raise AnalysisError(
            f"the weights of layer {signed[0]} may be negative, so they are no shares and no capacities; "
            "record without that normaliser"
        )
    return layers


def head_mixing(
    heads: Reduction | Sequence[Sequence[float]], layers: list[int], n_heads: int
) -> str | Tensor:
    """The name of a reduction, or head weights [layer, head] that sum to 1 in each layer."""
    if isinstance(heads, str):
        return heads if heads != "mean" else torch.full((len(layers), n_heads), 1 / n_heads)
    weights = torch.as_tensor(np.asarray(heads), dtype=torch.float32)
    if weights.shape != (len(layers), n_heads):
        raise AnalysisError(
            f"heads must hold weights [layer, head] = {(len(layers), n_heads)}, got shape {tuple(weights.shape)}"
        )
    total = weights.sum(1, keepdim=True)
    if not (weights >= 0).all() or not (total > 0).all():
        raise AnalysisError("heads must hold weights of 0 or more with at least one above 0 in every layer")
    return weights / total


def over_row_sums(rows: Tensor, mass: Tensor, weight: float) -> Tensor:
    """`rows` divided by the row sums of (1 - w)·A + w·I; NaN where a nonzero entry is on a row without weight."""
    total = ((1 - weight) * mass + weight)[..., None]
    return torch.where(rows == 0, 0.0, rows / torch.where(total > 0, total, torch.nan))


def joined_rows(record: Record, joining: Joining, depth: int) -> Iterator[tuple[slice, Tensor]]:
    """Ā of one layer without the keys set aside, a block of rows at a time, [batch, row, key] in float64 on the CPU.

    Rows of padding are zero.
    """
    for span, rows in _all_columns(record, joining.layers[depth], joining.mixing[depth]):
        yield span, rows if joining.kept is None else rows * joining.kept[:, None]


def _all_columns(record: Record, layer: int, mixing: str | Tensor) -> Iterator[tuple[slice, Tensor]]:
    if isinstance(mixing, str) and mixing == EFFECTIVE:
        yield from _effective_rows(record, layer)
        return
    for span, weights in record.map(layer).row_blocks():
        weights = weights.double().cpu()
        if isinstance(mixing, str):
            yield span, EXTREMES[mixing](weights, dim=1)
        else:
            yield span, torch.einsum("h,bhqk->bqk", mixing.double(), weights)


def _effective_rows(record: Record, layer: int) -> Iterator[tuple[slice, Tensor]]:
    for span, shares in record.effective_map(layer).map.mean_shares():
        shares = shares.double().cpu() * record.valid[:, span, None]
        if bool((shares * ~record.valid[:, None]).any()):
            raise AnalysisError(
                f"layer {layer} carries what stands at padding into the text; record texts of unequal length one by one"
            )
        yield span, shares
