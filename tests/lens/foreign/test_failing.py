"""Inputs on which a module fails or goes another way than on the sample are told in one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw


def attend(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Layer(nn.Module):
    def forward(self, x):
        return attend(x)


class Ways(nn.Module):
    """Which layers run is a matter of the numbers."""

    def __init__(self):
        super().__init__()
        self.layers, self.other = nn.ModuleList([Layer(), Layer()]), Layer()

    def forward(self, x):
        if x.sum() < -100:
            return self.other(x)
        return self.layers[1](self.layers[0](x)) if x.sum() > 0 else self.layers[0](x)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids, scale):
        return attend(self.mix(self.table(ids)) * scale)


def test_another_way_through_the_module():
    model = hw.load(Ways(), sample=torch.ones(1, 4, 8))
    assert model.record(-torch.ones(1, 4, 8), layers=[0]).layers == [0]
    for run, given, why in (
        (model.head_outputs, -torch.ones(1, 4, 8), r"layers \[1\] of Ways did not call attention on these"),
        (model.record, torch.full((1, 5, 8), -9.0), "does not call the attention of 'self' on these inputs"),
        (model, torch.full((1, 6, 8), -9.0), "does not call the attention of 'self' on these inputs"),
    ):
        with pytest.raises(hw.HeadwaterError, match=why):
            run(given)


def test_inputs_on_which_a_module_fails():
    ids, scale = torch.arange(6).view(2, 3), torch.ones(2, 3, 8)
    model = hw.load(Words(), sample=(ids, scale))
    for given, why in (
        (
            (ids + 5, scale),
            "Words fails on these inputs: IndexError",
        ),  # lengths are known: the run itself fails
        ((ids[:, :2], scale), "Words fails on these inputs: RuntimeError"),
        ((ids, "a"), "scale is a tensor in the sample; got 'a'"),
    ):
        with pytest.raises(hw.HeadwaterError, match=why):
            model(given)


def test_arrays_are_tensors():
    ids, scale = torch.arange(6).view(2, 3), torch.ones(2, 3, 8)
    module = Words()
    model = hw.load(module, sample=(ids.numpy(), scale.numpy()))
    torch.testing.assert_close(model((ids.numpy()[:, ::-1], scale.numpy())), module(ids.flip(1), scale))
    torch.testing.assert_close(model({"ids": ids.numpy()}, scale=scale.numpy()), module(ids, scale))


def test_what_needs_blocks_is_refused_for_that_reason():
    model = hw.load(Plain(), sample=torch.randn(2, 6, 16))
    for name in ("patch", "path_patch"):
        with pytest.raises(hw.HeadwaterError, match="the blocks of Plain are not known"):
            getattr(hw.analyses, name)(model, [(torch.randn(1, 6, 16),) * 2], measure=lambda out: out[:, 0])


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1)
        )
