"""Queries and keys of one number that come from different inputs are cross-attention."""

import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw


class Layer(nn.Module):
    """No name tells what it attends to."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y, mask=None):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(x), self.k(y), y))
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([Layer(), Layer()])
        self.second = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, words, mask=None):
        for one, two in zip(self.first, self.second, strict=True):
            x = one(x, x)
            x = two(x, words, mask)
        return x


def test_equal_lengths_are_told_apart():
    torch.manual_seed(0)
    module, given = Stack().eval(), (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    model = hw.load(module, sample=given)
    assert {name: (part.crosses, len(part.modules)) for name, part in model.parts.items()} == {
        "self": (False, 2), "cross": (True, 2),
    }  # fmt: skip
    assert model.record((given[0], given[1][:, :3])).part("cross").map(1).shape == (2, 2, 5, 3)


def test_padding_of_the_source_is_no_padding_of_the_queries():
    torch.manual_seed(0)
    layer, x, words = Layer().eval(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    seen = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    seen[1, ..., 3:] = False
    record = hw.load(layer, sample=(x, words)).record((x, words), mask=seen)
    q, k = (t.double().unflatten(-1, (2, -1)).transpose(1, 2) for t in (layer.q(x), layer.k(words)))
    weights = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = -torch.where(weights > 0, weights * weights.log(), 0.0).sum(-1)
    torch.testing.assert_close(record.statistics["entropy"][:, 0], expected.float())
    assert record.valid.all()
    assert record.key_axis.valid.equal(seen[:, 0, 0])


def test_self_attention_beside_another_input_stays_its_own():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.shift = Layer(), nn.Linear(8, 8)

        def forward(self, x, condition):
            x = x + self.shift(condition)
            return self.layer(x, x)

    model = hw.load(Conditioned(), sample=(torch.randn(1, 5, 8), torch.randn(1, 5, 8)))
    assert list(model.parts) == ["self"]


def test_a_sample_as_long_as_its_batch():
    torch.manual_seed(0)
    for batch_first in (True, False):
        module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first).eval()
        model, x = hw.load(module, sample=torch.randn(4, 4, 8)), torch.randn(6, 3, 8)
        alone = x[[1]] if batch_first else x[:, [1]]
        torch.testing.assert_close(model(model.to_tokens(x).rows([1])), module(alone))
