"""Comparisons of results with their oracles. All are made in float64, and NaN must stand where NaN is expected.

float32 knows each score to its last digit, and rounding of a score enters the exponential: for scores of up to about a
hundred, weights are known to 3e-5. Sums over many keys or long distances are off by as many terms: `scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def near(found: Tensor, expected: Tensor, error: float = 1e-12, what: str = "") -> None:
    """Equal to `error`, absolute and relative."""
    within(found, expected, error, error, what)


def close(found: Tensor, expected: Tensor, scale: float = 1.0, what: str = "") -> None:
    """float32 arithmetic of one attention against float64."""
    within(found, expected, 3e-5 * scale, 3e-5, what)


def close_run(found: Tensor, expected: Tensor, error: float = 1e-4) -> None:
    """A whole model in float32 against float64: each layer adds to the rounding; `error` is the absolute one."""
    within(found, expected, error, 1e-4)


def within(found: Tensor, expected: Tensor, absolute: float, relative: float, what: str = "") -> None:
    torch.testing.assert_close(
        found.double().cpu(), expected.double(), atol=absolute, rtol=relative, equal_nan=True,
        msg=lambda message: f"{what}: {message}",
    )  # fmt: skip
