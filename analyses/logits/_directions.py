"""A direction of the residual stream that the user gives (of a probe, of an unembedding), with its shape checked."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.files import read_bytes
from headwater.lens.model import HookedModel

Direction = str | Path | Tensor | np.ndarray | Sequence[float]
MOST_BYTES = 2**24


def direction_of(model: HookedModel, given: Direction) -> Tensor:
    """The direction [d_model] in float64, from numbers or from a .npy file; finite and not zero."""
    if isinstance(given, str | Path):
        given = _in_file(Path(given))
    try:
        found = torch.as_tensor(given).detach().to("cpu", torch.float64)
    except (ValueError, TypeError, RuntimeError):
        raise AnalysisError(
            f"direction is no list of numbers; give {model.d_model} of them, the width of {model.name}"
        ) from None
    if found.shape != (model.d_model,):
        raise AnalysisError(
            f"direction has shape {tuple(found.shape)}; give ({model.d_model},), the width of {model.name}"
        )
    if not found.isfinite().all():
        place = int((~found.isfinite()).nonzero()[0])
        raise AnalysisError(f"direction[{place}] is {float(found[place])}; give finite numbers")
    if not found.any():
        raise AnalysisError("direction is zero everywhere, so nothing can be read along it; give another")
    return found


def _in_file(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        raise AnalysisError(f"direction={path.name!r} is no .npy file; write one with numpy.save")
    content = read_bytes(path, MOST_BYTES, AnalysisError, "give one vector")
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError):
        raise AnalysisError(f"{path} holds no array of numbers; give a file of numpy.save") from None
