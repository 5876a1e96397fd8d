"""Recipes for text-to-image models: words read more by the heads of their concept (HRV)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headwater.lens.edits.at_steps import AtSteps
from headwater.lens.edits.base import Edit
from headwater.lens.edits.weights import ScaleWeights
from headwater.lens.errors import EditError
from headwater.lens.naming.positions import Positions
from headwater.lens.running.denoising import CONDITIONAL


def concept_strengthening(
    keys: Positions, wanted: Mapping[str, float], unwanted: Mapping[str, float] | None = None, *,
    strength: float = 1.0, least: float = 0.0,
) -> list[Edit]:  # fmt: skip
    """HRV (Park et al. 2024): multiply each head's weights on a word by the relevance of its concept.

    A_ij ← A_ij · (1 + strength · (r_h - 1)) for words j in `keys`, in the branch with words; r = `wanted`, head →
    relevance, 1 on average. With `unwanted` (concept adjusting) r_h = 1 + wanted_h - unwanted_h. Factors below `least`
    are set to it. Rows are not renormalised. Formula from the text; `keys` counts tokens from the first one.

    >>> import headwater as hw
    >>> [edit.to_python() for edit in hw.recipes.concept_strengthening([2], {"0.1": 3.0, "1.0": 1.0})]
    ["hw.AtSteps(hw.ScaleWeights(keys=[2], factor=3.0, heads=['0.1']), branch='conditional')"]
    """
    for name, vector in (("wanted", wanted), ("unwanted", unwanted or {})):
        if not isinstance(vector, Mapping):
            raise EditError(f"concept_strengthening: {name} maps heads to relevance; got {vector!r:.60}")
    others: Mapping[str, float] = unwanted or {}
    relevance = {
        head: (1 + own - others.get(head, 0.0)) if unwanted is not None else own
        for head, own in wanted.items()
    }
    by_factor: dict[float, list[str]] = {}
    for head, r in relevance.items():
        factor = max(least, 1 + strength * (float(r) - 1))
        by_factor.setdefault(factor, []).append(head)
    return [
        AtSteps(ScaleWeights(keys, factor, heads=_listed(heads)), branch=CONDITIONAL)
        for factor, heads in by_factor.items()
        if factor != 1
    ]


def _listed(heads: Sequence[str]) -> list[str]:
    return sorted(heads, key=lambda head: [int(n) for n in head.split(".")])
