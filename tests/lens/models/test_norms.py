"""What counts as a norm: the formula of LayerNorm and RMSNorm, held to what a module gave."""

from __future__ import annotations

import torch
from torch import nn

from headwater.lens.models.norms import epsilon, is_norm


def test_the_formula_decides_what_is_a_norm() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    for norm in (
        nn.LayerNorm(16, eps=1e-3),
        nn.RMSNorm(16, eps=1e-2),
        nn.LayerNorm(16, elementwise_affine=False),
    ):
        assert is_norm(norm, x, norm(x))
        assert is_norm(norm, 1e-2 * x, norm(1e-2 * x))  # epsilon counts
        assert not is_norm(norm, x, norm(x) + 0.01 * x)
    assert epsilon(nn.LayerNorm(4, eps=1e-3)) == 1e-3
    for other in (nn.Tanh(), nn.Linear(16, 16), nn.GroupNorm(1, 5)):
        assert not is_norm(other, x, other(x))


def test_zeros_fit_any_formula_and_show_no_norm():
    nothing = torch.zeros(1, 3, 8)
    assert not is_norm(torch.nn.Dropout().eval(), nothing, nothing)
    assert not is_norm(torch.nn.Identity(), nothing, nothing)
    assert is_norm(torch.nn.LayerNorm(8), nothing, nothing)
