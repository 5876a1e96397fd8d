"""Compare two computations of the same numbers; the error says how far apart they are."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.models.linear import QUANTISED, quantised
from headwater.lens.models.opened import Opened

COARSE = 1e-4  # with a larger machine epsilon than this, sums of a model's parts do not add up


def relative_difference(found: Tensor, expected: Tensor, least: float = 1e-3) -> float:
    """Largest |difference| / largest |number| on either side, divisor at least `least`; NaN if any number is NaN."""
    wide = torch.promote_types(torch.promote_types(found.dtype, expected.dtype), torch.float32)
    found, expected = found.detach().to(wide), expected.detach().to(wide)
    size = torch.maximum(found.abs().max(), expected.abs().max()).clamp_min(least)
    return float((found - expected).abs().max() / size)


def close_or_refuse(
    found: Tensor, expected: Tensor, what: str, then: str = "", *, allowed: float = 1e-3, least: float = 1e-3,
    error: type[HeadwaterError] = AnalysisError,
) -> None:  # fmt: skip
    """Raise `error` if the relative difference exceeds `allowed`; its text is `what`, the numbers, then `then`."""
    difference = relative_difference(found, expected, least)
    if not difference <= allowed:
        sizes = f"(relative difference {difference:.1e}, allowed {allowed:.0e})"
        raise error(f"{what} {sizes}{then}")


def of_sums(model: Opened, allowed: float = 1e-3) -> float:
    """The `allowed` difference between a sum of a model's parts and its own value: more where weights have few bits."""
    return max(allowed, QUANTISED) if quantised(model.hf.modules()) else allowed


def rounding_mend(model: Opened) -> str:
    """The end of the error for a model in low precision: load it in float32. Empty for float32 and float64."""
    if torch.finfo(model.dtype).eps < COARSE:
        return ""
    return f"; it runs in {str(model.dtype).removeprefix('torch.')}, whose rounding may be why: load it in float32"
