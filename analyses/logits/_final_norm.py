"""The final norm along a straight path of streams: what each part adds to a logit, without a frozen scale.

The path integrals are those of Aumann & Shapley (integrated gradients; Sundararajan et al. 2017). A norm divides by the
root of a quadratic in the path's parameter, so the integrals have a closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._streams.readout import Readout
from headwater.lens.errors import AnalysisError

POINTS = 32
LITTLE = 1e-2  # relative to the stream's spread: a shorter path is integrated by quadrature


@dataclass(frozen=True, eq=False)
class PathReadout:
    """`shares(c) = c·∫ ∇f(begin + α(end - begin)) dα`, where f is the logit through the norm; `begun` [batch] is
    f(begin).

    `reading` [batch, d_model] is the integral. The shares of the parts between begin and end add up to f(end) -
    f(begin); `begun` is the share of the stream at the start.
    """

    reading: Tensor
    begun: Tensor

    @classmethod
    def of(cls, readout: Readout, epsilon: float, begin: Tensor, end: Tensor) -> PathReadout:
        """From stream `begin` to stream `end`, both [batch, d_model], as `readout` reads them."""
        norm = readout.norm
        read = norm.gain * readout.direction
        start, way = begin, end - begin
        if norm.centred:
            read, start, way = (part - part.mean(-1, keepdim=True) for part in (read, start, way))
        spread = way.square().mean(-1)
        first = start.square().mean(-1) + epsilon
        begun = (read * start).sum(-1) / first.sqrt()
        short = (spread <= LITTLE * first)[:, None]
        reading = torch.where(
            short, _by_quadrature(read, start, way, epsilon), _closed(read, start, way, epsilon)
        )
        if not reading.isfinite().all():
            raise AnalysisError(
                "the path passes a stream of length 0, where a norm without an epsilon has no slope; take norm=frozen"
            )
        return cls(reading, begun)

    def shares(self, vectors: Tensor) -> Tensor:
        """The shares of vectors [batch, …, d_model] at the position in the difference, [batch, …]."""
        return (vectors * self.reading.reshape(len(vectors), *[1] * (vectors.dim() - 2), -1)).sum(-1)


def _closed(read: Tensor, start: Tensor, way: Tensor, epsilon: float) -> Tensor:
    """The integral of w/√q - (w·y) y/(n q^3/2) along y = rest + β way, rest ⟂ way, where q = spread β² + least."""
    size = way.shape[-1]
    spread = way.square().mean(-1, keepdim=True).clamp_min(torch.finfo(way.dtype).tiny)
    from_beta = (start * way).mean(-1, keepdim=True) / spread
    rest = start - from_beta * way
    least = rest.square().mean(-1, keepdim=True) + epsilon

    def between(function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(from_beta + 1) - function(from_beta)

    length = lambda beta: (spread * beta.square() + least).sqrt()  # noqa: E731
    inverse = between(lambda beta: torch.asinh(beta * (spread / least).sqrt())) / spread.sqrt()
    zeroth = between(lambda beta: beta / length(beta)) / least
    once = between(lambda beta: -1 / length(beta)) / spread
    twice = (inverse - zeroth * least) / spread
    of_rest, of_way = ((read * part).sum(-1, keepdim=True) for part in (rest, way))
    turned = (of_rest * zeroth + of_way * once) * rest + (of_rest * once + of_way * twice) * way
    return inverse * read - turned / size


def _by_quadrature(read: Tensor, start: Tensor, way: Tensor, epsilon: float) -> Tensor:
    found = torch.zeros_like(way)
    for node, weight in zip(*np.polynomial.legendre.leggauss(POINTS), strict=True):
        y = start + (node + 1) / 2 * way
        scale = (y.square().mean(-1, keepdim=True) + epsilon).sqrt()
        along = (read * y).mean(-1, keepdim=True)
        found += weight / 2 * (read / scale - along * y / scale**3)
    return found
