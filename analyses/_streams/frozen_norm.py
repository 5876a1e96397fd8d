"""LayerNorm and RMSNorm with the scale that they have in a run: linear maps, under which a sum falls apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from headwater.lens.models import blocks


@dataclass(frozen=True, eq=False)
class NormForm:
    """What a norm does to any input, biases apart: `gain ⊙ (x, less its mean if centred) / sqrt(spread + epsilon)`."""

    gain: Tensor
    centred: bool
    epsilon: float

    @classmethod
    def of(cls, norm: nn.Module, width: int) -> NormForm:
        return cls(blocks.norm_gain(norm, width), blocks.takes_mean_out(norm, width), blocks.epsilon(norm))

    def at(self, given: Tensor) -> Norm:
        """The norm with the scale that `given` [..., d_model] has."""
        spread = given.var(-1, correction=0) if self.centred else given.square().mean(-1)
        return Norm(self.gain.to(given), self.centred, (spread + self.epsilon).sqrt())


@dataclass(frozen=True, eq=False)
class Norm:
    """The linear part of a norm on given inputs, `gain ⊙ (x, less its mean if centred) / deviation`.

    `gain` [d_model], `deviation` [batch, position].
    """

    gain: Tensor
    centred: bool
    deviation: Tensor

    @classmethod
    def of(cls, norm: nn.Module, given: Tensor) -> Norm:
        return NormForm.of(norm, given.shape[-1]).at(given.double())

    def at(self, position: int) -> Norm:
        """The norm of one position, `deviation` [batch]."""
        return replace(self, deviation=self.deviation[:, position])

    def linear(self, x: Tensor) -> Tensor:
        """Without the division, which differs by position."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centred else x)

    def divided(self, x: Tensor) -> Tensor:
        """Of vectors [batch, position, …, d_model], or [batch, …, d_model] where the norm is that of one position."""
        inner = [1] * (x.dim() - self.deviation.dim())
        return self.linear(x) / self.deviation.reshape(*self.deviation.shape, *inner)
