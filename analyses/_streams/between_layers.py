"""Refuse products over layers where something without an attention map moves information between positions as well.

A product of maps says through which positions information came. It holds only if attention is all that carries
information from one position to another in the layers that are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable

from headwater.lens.errors import AnalysisError
from headwater.lens.models.stack import Mixer, named

INSTEAD = (
    "read layers one by one (raw_attention, attention_distance) or use input_x_gradient, integrated_gradients or "
    "blank_out, which see the whole model"
)


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
