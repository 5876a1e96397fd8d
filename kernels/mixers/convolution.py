"""`ConvolutionMap`: a causal convolution of each channel as a banded map, the same for every text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.kernels.mixers.mixer_map import MixerMap
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, OverKeys, OverQueries, Weights


@dataclass(frozen=True, eq=False)
class ConvolutionMap(MixerMap):
    """A_ij = w_{K-1-(i-j)} for 0 ≤ i - j < K, one map per channel; `taps` [channel, tap] are w.

    >>> import torch
    >>> from headwater.kernels.mixers.convolution import ConvolutionMap
    >>> map = ConvolutionMap(torch.tensor([[0.25, 0.75]]), batch=1, length=3)
    >>> map.dense()[0, 0].tolist()
    [[0.75, 0.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.25, 0.75]]
    """

    taps: Float[Tensor, "channel tap"]
    batch: int
    length: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, channel, query, key)."""
        return (self.batch, self.taps.shape[0], self.length, self.length)

    def gather(self, x: OverKeys) -> AtQueries:
        """`map @ x`."""
        return self._sum(x, forward=True)

    def scatter(self, y: OverQueries) -> AtKeys:
        """`map.T @ y`."""
        return self._sum(y, forward=False)

    def window(self, rows: slice, columns: slice, heads: Tensor) -> Weights:
        """Weights of plain slices and chosen channels."""
        last = self.taps.shape[1] - 1
        back = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(columns.start, columns.stop)
        tap = (last - back).to(self.taps.device)
        found = self.taps[heads.to(tap.device)][:, tap.clamp(0, last)] * ((tap >= 0) & (tap <= last))
        return found.expand(self.batch, -1, -1, -1)

    def _sum(self, x: Tensor, forward: bool) -> Tensor:
        out = torch.zeros(*self.shape[:3], x.shape[-1], dtype=self.taps.dtype, device=self.taps.device)
        x = x.to(out)
        last = self.taps.shape[1] - 1
        for back in range(min(last + 1, self.length)):
            later, earlier = slice(back, None), slice(0, self.length - back)
            into, of = (later, earlier) if forward else (earlier, later)
            out[:, :, into] += self.taps[:, last - back, None, None] * x[:, :, of]
        return out
