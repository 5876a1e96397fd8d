"""LayerNorm and RMSNorm by what they give, and what the modules of a block read: a norm's output or the stream itself.

`Flow` is found when a model is opened (loading/flows.py), from the tensors of one short run and not from names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEAD = "head"  # the key of the flow of the language head, beside those of the layers
LARGE = 1000.0  # of the probe: epsilon is nothing beside its square
SAME = {torch.float64: 1e-6, torch.float32: 1e-3}  # largest relative difference from the formula of a norm
COARSE = 3e-2


@dataclass(frozen=True, eq=False)
class Flow:
    """What the modules of one block read, in one run.

    `reads` gives the norm whose output a module reads, or None for a module that reads the block's input as it is. A
    module that reads anything else is not in it. `behind` gives the norm that reads a module's output. `ends` says that
    the block's output is a norm's (BERT).
    """

    reads: Mapping[nn.Module, nn.Module | None]
    behind: Mapping[nn.Module, nn.Module]
    ends: bool = False


def norm_gain(norm: nn.Module | None, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gain [width] of a LayerNorm or RMSNorm, however it is stored (Gemma stores gain - 1); ones for no norm.

    Measured, not read: a vector of alternating ±1000 has mean 0 and root mean square 1000, large beside epsilon, so the
    norm returns ±gain + bias.
    """
    return torch.ones(width, dtype=dtype) if norm is None else _affine(norm, width, dtype)[0]


def norm_bias(norm: nn.Module | None, width: int) -> Tensor:
    """The bias [width] of a LayerNorm; zeros for RMSNorm and for no norm."""
    return torch.zeros(width) if norm is None else _affine(norm, width)[1]


def _affine(norm: nn.Module, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    like = next(norm.parameters(), torch.empty(0))
    probe = torch.full((width,), LARGE, dtype=like.dtype, device=like.device)
    probe[1::2] = -LARGE
    with torch.no_grad():
        up, down = norm(probe), norm(-probe)
        return ((up - down) / (2 * probe.sign())).to(dtype), ((up + down) / 2).to(dtype)


def takes_mean_out(norm: nn.Module, width: int) -> bool:
    """Whether the norm subtracts the mean: LayerNorm gives the same for x and x + 1, RMSNorm does not."""
    like = next(norm.parameters(), torch.empty(0))
    probe = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return bool(torch.allclose(norm(probe), norm(probe + 1), atol=1e-2))


def epsilon(norm: nn.Module) -> float:
    """The epsilon that the norm adds to the variance."""
    found = (getattr(norm, name, None) for name in ("eps", "variance_epsilon", "epsilon"))
    return next((float(value) for value in found if isinstance(value, int | float)), 0.0)


def is_norm(module: nn.Module, given: Tensor, output: Tensor) -> bool:
    """Whether a module made `output` of `given` by the formula of LayerNorm or RMSNorm, both [..., width]."""
    if given.shape != output.shape or any(weight.dim() > 1 for weight in module.parameters()):
        return False
    width = given.shape[-1]
    try:
        gain, bias = (f(module, width).to(given.device).double() for f in (norm_gain, norm_bias))
        centred = takes_mean_out(module, width)
    except Exception:  # it takes other inputs than a stream
        return False
    if not given.any():  # zeros fit any formula; a module that keeps sizes apart is no norm
        probe = torch.linspace(-1, 1, given.shape[-1], dtype=given.dtype, device=given.device)
        with torch.no_grad():
            given = torch.stack([probe, 3 * probe])
            output = module(given)
    x = given.double()
    x = x - x.mean(-1, keepdim=True) if centred else x
    expected = gain * x / (x.square().mean(-1, keepdim=True) + epsilon(module)).sqrt() + bias
    off = (expected - output.double()).abs().nan_to_num().max()
    return bool(off <= SAME.get(output.dtype, COARSE) * output.double().abs().nan_to_num().max())
