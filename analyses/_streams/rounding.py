"""What rounding has to do with a refusal: sums that hold in float32 may not hold in half precision."""

from __future__ import annotations

import torch

from headwater.lens.model import HookedModel

COARSE = 1e-4  # spacing of numbers near 1 above which sums of a model's parts are seen not to add up


def in_half(model: HookedModel) -> str:
    """The end of a line that says that parts do not add up: the mend, where the model's precision may be to blame."""
    if torch.finfo(model.dtype).eps < COARSE:
        return ""
    return f"; it runs in {str(model.dtype).removeprefix('torch.')}, whose rounding may be why: load it in float32"
