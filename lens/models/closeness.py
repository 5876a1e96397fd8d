"""Two computations of the same numbers are compared, and an error says how far apart they are."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.models.opened import Opened

COARSE = 1e-4  # spacing of numbers near 1 above which sums of a model's parts are seen not to add up


def relative_difference(found: Tensor, expected: Tensor, least: float = 1e-3) -> float:
    """The largest difference over the largest number on either side, or over `least`; NaN where a number is NaN."""
    wide = torch.promote_types(torch.promote_types(found.dtype, expected.dtype), torch.float32)
    found, expected = found.detach().to(wide), expected.detach().to(wide)
    size = torch.maximum(found.abs().max(), expected.abs().max()).clamp_min(least)
    return float((found - expected).abs().max() / size)


def close_or_refuse(
    found: Tensor, expected: Tensor, what: str, then: str = "", *, allowed: float = 1e-3, least: float = 1e-3,
    error: type[HeadwaterError] = AnalysisError,
) -> None:  # fmt: skip
    """Raise `error` where the two differ by more than `allowed`: `what` is wrong, the sizes, what follows from it."""
    difference = relative_difference(found, expected, least)
    if not difference <= allowed:
        sizes = f"(relative difference {difference:.1e}, allowed {allowed:.0e})"
        raise error(f"{what} {sizes}{then}")


def rounding_mend(model: Opened) -> str:
    """The end of such a line: the mend where the precision that the model runs in may be to blame."""
    if torch.finfo(model.dtype).eps < COARSE:
        return ""
    return f"; it runs in {str(model.dtype).removeprefix('torch.')}, whose rounding may be why: load it in float32"
