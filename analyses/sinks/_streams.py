"""The residual stream and the values of a record, as the analyses of their norms and directions read them."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record


def states(record: Record) -> tuple[list[int | str], list[int]]:
    """The places of the recorded streams, and their numbers: layers, and one more for what leaves the last block."""
    places: list[int | str] = list(record.layers)
    record.residual(record.layers[0])  # raises if the record did not keep it
    if "final" in record.residuals:
        places.append("final")
    return places, [*record.layers, *[record.layers[-1] + 1] * (len(places) - len(record.layers))]


def stream_of(record: Record, place: int | str) -> Tensor:
    """One stream [batch, position, d_model] in float64."""
    return record.residual(place).double().cpu()


def norms_of(record: Record) -> Tensor:
    """‖x‖ of every token's stream, [batch, layer, position] in float64."""
    return torch.stack([stream_of(record, place).norm(dim=-1) for place in states(record)[0]], 1)


def refuse_without_values(record: Record, keep: str) -> None:
    """AnalysisError for a record that holds no values, or those of a model that shows none."""
    if not record.values:
        raise AnalysisError(f"the record holds no values; record with keep={keep} to have them")
    if not record.values[record.layers[0]].shape[-1]:
        raise AnalysisError(
            f"{record.provenance.get('model')} computes its attention itself and shows no values"
        )
