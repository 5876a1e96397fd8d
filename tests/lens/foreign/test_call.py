"""A call of `scaled_dot_product_attention` as Headwater reads it gives what torch gives."""

import pytest
import torch
import torch.nn.functional as F

from headwater.lens.errors import ModelError
from headwater.lens.foreign.call import read
from headwater.lens.foreign.meeting import AttentionCall, Key, answered

SITE = AttentionCall(Key("", 0, 0), own=True)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def later(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).triu(1)


def padded(rows, keys):
    """The last two keys of row 1 are padding: bool [row, 1, 1, key], True where visible."""
    seen = torch.ones(rows, 1, 1, keys, dtype=torch.bool)
    seen[1, ..., -2:] = False
    return seen


CALLS = {  # shapes of q, k, v; arguments; batch
    "plain": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 6), {}),
    "scale": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {"scale": 0.3}),
    "causal, more keys": ((2, 3, 4, 4), (2, 3, 7, 4), (2, 3, 7, 4), {"is_causal": True}),
    "causal, fewer keys": ((2, 3, 7, 4), (2, 3, 4, 4), (2, 3, 4, 4), {"is_causal": True}),
    "grouped queries": ((2, 6, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"enable_gqa": True}),
    "one key head": ((2, 6, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4), {}),
    "one row of keys": ((2, 3, 5, 4), (1, 3, 6, 4), (1, 3, 6, 4), {}),
    "mask of pairs": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {"attn_mask": ~later(5, 5)}),
    "padding": ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), {"attn_mask": padded(2, 6)}),
    "padding, causal": ((2, 3, 6, 4), (2, 3, 6, 4), (2, 3, 6, 4), {"attn_mask": padded(2, 6) & ~later(6, 6)}),
    "bias": ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), {"attn_mask": numbers(3, 5, 6)}),
    "bias that hides": (
        (2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4),
        {"attn_mask": numbers(1, 3, 5, 5).masked_fill(later(5, 5), float("-inf"))},
    ),
    "least numbers": (
        (2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4),
        {"attn_mask": torch.zeros(5, 5, dtype=torch.float64).masked_fill(later(5, 5), torch.finfo(torch.float64).min)},
    ),
    "heads in the batch": ((6, 5, 4), (6, 5, 4), (6, 5, 4), {}),
    "heads and masks in the batch": ((6, 5, 4), (6, 7, 4), (6, 7, 4), {"attn_mask": numbers(6, 5, 7) > -0.5}),
    "no head": ((5, 4), (7, 4), (7, 4), {}),
    "frames": ((2, 4, 3, 5, 4), (2, 4, 3, 5, 4), (2, 4, 3, 5, 4), {"attn_mask": numbers(2, 1, 1, 5, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_answers_are_torchs(name):
    torch.manual_seed(0)
    *shapes, more = CALLS[name]
    q, k, v = (numbers(*shape) for shape in shapes)
    expected = F.scaled_dot_product_attention(q, k, v, **more)
    found, map = answered(SITE, read(q, k, v, **more, where="x", batch=2))
    torch.testing.assert_close(found, expected)
    assert map.shape[2:] == (q.shape[-2], k.shape[-2])


def test_heads_in_the_batch_are_heads():
    q = numbers(6, 5, 4)
    assert read(q, q, q, where="x", batch=2).q.shape == (2, 3, 5, 4)
    assert read(q, q, q, where="x", batch=6).q.shape == (6, 1, 5, 4)


def test_what_a_mask_says():
    q = numbers(2, 3, 6, 4)
    both = read(q, q, q, attn_mask=padded(2, 6) & ~later(6, 6), where="x").mask(own=True)
    assert both.right == 0
    assert both.extra is None
    assert both.valid_keys is not None
    assert both.valid_keys[1].tolist() == [True] * 4 + [False] * 2
    assert both.valid_queries is not None
    assert both.valid_queries.equal(both.valid_keys)
    assert read(q, q, q, attn_mask=padded(2, 6), where="x").mask(own=False).valid_queries is None
    odd = read(q, q, q, attn_mask=torch.eye(6, dtype=torch.bool), where="x").mask(own=True)
    assert odd.extra is not None
    assert odd.right is None


def test_a_learned_bias_keeps_its_gradient():
    q, bias = numbers(1, 2, 3, 4), numbers(2, 3, 3).requires_grad_()
    answered(SITE, read(q, q, q, attn_mask=bias, where="x"))[0].square().sum().backward()
    found, bias.grad = bias.grad, None
    F.scaled_dot_product_attention(q, q, q, bias).square().sum().backward()
    torch.testing.assert_close(found, bias.grad)


def test_refuses_dropout_and_nested_tensors():
    q = numbers(1, 2, 3, 4)
    with pytest.raises(ModelError, match=r"dropout_p=0\.1"):
        read(q, q, q, dropout_p=0.1, where="blocks.0")
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, 4)], layout=torch.jagged)
    with pytest.raises(ModelError, match="nested tensors"):
        read(nested, nested, nested, where="x")
