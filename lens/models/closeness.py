"""Compare two computations of the same numbers: what of a run counts, and an error that says how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError, HeadwaterError, ModelError
from headwater.lens.models.classes import logits_of
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


def answer(out: Any) -> Tensor:
    """The main output: logits, else the last hidden state, else other logits, else the first numbers."""
    named = (getattr(out, "logits", None), getattr(out, "last_hidden_state", None), logits_of(out))
    found = next((item for item in named if isinstance(item, Tensor)), None)
    if found is None:
        found = next((item for item in _tensors(out) if item.is_floating_point()), None)
    if found is None:
        raise ModelError(f"{type(out).__name__} holds no numbers; this model can not be read")
    return found


def of_real(output: Tensor, sample: Mapping[str, Tensor]) -> Tensor:
    """The rows of real tokens, [token, …], of an output that belongs to the text; any other output as it is."""
    mask = sample.get("decoder_attention_mask", sample.get("attention_mask"))
    if mask is None or output.dim() != 3 or output.shape[:2] != mask.shape:
        return output
    return output[mask.bool().to(output.device)]  # the last layer may be on another device than the first


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping | list | tuple):
        for item in out.values() if isinstance(out, Mapping) else out:
            yield from _tensors(item)
