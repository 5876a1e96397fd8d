"""Refuse products over layers where something without an attention map moves information between positions as well.

A product of maps says through which positions information came. It holds only if the attention that is multiplied is
all that carries information from one position to another in its layers, and all that brings in information of others.
"""

from __future__ import annotations

from collections.abc import Iterable

from headwater.lens.errors import AnalysisError
from headwater.lens.models.opened import Opened
from headwater.lens.models.stack import Mixer, named

INSTEAD = (
    "read layers one by one (raw_attention, attention_distance) or use input_x_gradient, integrated_gradients or "
    "blank_out, which see the whole model"
)

ACROSS = "take the part with the other tokens (model.part), or alti or relevance, which follow both"


def refuse_mixers(
    model: str | None, mixers: Iterable[Mixer], what: str, low: int | None = None, high: int | None = None,
    instead: str = INSTEAD,
) -> None:  # fmt: skip
    """AnalysisError if a block from `low` to `high` holds a mixer without a map; None: from the first, to the last."""
    found = [m for m in mixers if (low is None or m.layer >= low) and (high is None or m.layer <= high)]
    if found:
        raise AnalysisError(
            f"{what} needs layers where attention alone moves information between positions; in {model} "
            f"{' and '.join(named(found))} does too and has no attention map; {instead}"
        )


def refuse_crossing(model: Opened, what: str) -> None:
    """AnalysisError for cross-attention, whose keys are no queries of the layer below, and for a stack with
    cross-attention beside its own, through which other tokens come in."""
    part = model.parts[model.part_name]
    if part.crosses:
        raise AnalysisError(
            f"{what} follows maps from layer to layer; the keys of {part.name} in {model.name} are no queries of the "
            f"layer below; {ACROSS}"
        )
    if model.other_attention:
        raise AnalysisError(
            f"{what} follows the maps of the {part.name} alone; in {model.name} "
            f"{' and '.join(model.other_attention)} brings in other tokens; {ACROSS}"
        )
