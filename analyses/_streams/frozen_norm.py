"""LayerNorm and RMSNorm with the scale of a run held fixed: linear maps, which act on each term of a sum.

And norms as they are, of streams so many that a backward pass computes them again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headwater.lens.attention import backward_rules
from headwater.lens.models import norms


@dataclass(frozen=True, eq=False)
class NormForm:
    """A norm without its bias: `gain ⊙ (x, minus its mean if centred) / sqrt(spread + epsilon)`."""

    gain: Tensor
    centred: bool
    epsilon: float

    @classmethod
    def of(cls, norm: nn.Module, width: int) -> NormForm:
        return cls(norms.norm_gain(norm, width), norms.takes_mean_out(norm, width), norms.epsilon(norm))

    def at(self, given: Tensor) -> Norm:
        """The norm with its scale fixed to that of `given` [..., d_model]."""
        spread = given.var(-1, correction=0) if self.centred else given.square().mean(-1)
        return Norm(self.gain.to(given), self.centred, (spread + self.epsilon).sqrt())


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm with fixed scale, `gain ⊙ (x, minus its mean if centred) / deviation`.

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
        """The norm without the division by `deviation`."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centred else x)

    def divided(self, x: Tensor) -> Tensor:
        """The norm of vectors [batch, position, …, d_model], or [batch, …, d_model] after `at`."""
        inner = [1] * (x.dim() - self.deviation.dim())
        return self.linear(x) / self.deviation.reshape(*self.deviation.shape, *inner)


def normed_of(norm: nn.Module | None, streams: Tensor) -> Tensor:
    """What a norm gives for the streams of some inputs. Its steps are as large as these each, so that a backward pass
    computes them again and does not keep them; rules of a backward pass must see them in the forward pass."""
    if norm is None:
        return streams
    if not torch.is_grad_enabled() or backward_rules.current() is not None:
        return norm(streams)
    return checkpoint(norm, streams, use_reentrant=False, preserve_rng_state=False)
