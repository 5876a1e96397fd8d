"""Gradients of attention (`attend.py`), its edits, its statistics and products.

Held against finite differences and transformers' eager attention.

They are taken through `attend.py`. Mutations seen to fail here: weights of a block detached before the edits, the
factor of an edit detached, the row's log-sum-exp detached when a map is made with `differentiable=True`, the gate
applied to a detached output, keys that learn alone left to the fused kernel, the log-sum-exp of nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.kernels.attend import attend
from headwater.kernels.edits.outputs import Gate
from headwater.kernels.edits.scores import BiasKeys, BlockScores, ScaleScores
from headwater.kernels.edits.weights import MixIdentity, Rescale
from headwater.kernels.maps import statistics
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context

HEADS = torch.tensor([True, False, True, True])
KEYS = torch.arange(6)[None] < 2
MASKS = {
    "causal": Mask(6, 6, right=0),
    "full": Mask(6, 6),
    "padded": Mask(6, 6, right=0, valid_keys=torch.arange(6)[None] >= torch.tensor([[0], [2]])),
    "window": Mask(6, 6, left=2, right=0),
}
SCORES = {
    "none": (),
    "scores": (
        ScaleScores(HEADS, 1.7),
        BiasKeys(HEADS, torch.linspace(-1, 1, 6)[None].double()),
        BlockScores(HEADS, torch.arange(6)[None] > 3, KEYS),
    ),
}
WEIGHTS = (Rescale(HEADS, KEYS, ~KEYS, 0.3), MixIdentity(~HEADS, 0.2))


def inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 6, 4), (2, 2, 6, 4), (2, 2, 6, 3))
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )


@pytest.mark.parametrize("kind", ["cache", "sinks", "edit"])
def test_keys_that_learn_alone_get_the_gradient_of_blocks(kind):
    """Cached keys, or a key projection trained by itself: the fused log-sum-exp carries no gradient to them."""
    q, k, v = (x.detach() for x in inputs())
    k.requires_grad_()
    rule = ScoreRule(0.5, Mask(6, 6, right=0))
    if kind == "cache":
        q, rule = q[:, :, 4:], ScoreRule(0.5, Mask(2, 6, right=0, query_offset=4))
    if kind == "sinks":
        rule = replace(rule, sinks=torch.zeros(4))
    edits = (Rescale(HEADS, KEYS, ~KEYS, 0.3),) if kind == "edit" else ()

    def slope(backend):
        return torch.autograd.grad(attend(q, k, v, rule, edits, backend)[0][..., 0].sum(), k)[0]

    torch.testing.assert_close(slope("auto"), slope("blocked"), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_weight_handed_to_almost_nothing_has_a_finite_gradient(backend):
    """Keys with 1e-25 of a row get its freed weight: in float32 a slope of 1 / (1e-25)² would be infinite."""
    edits = (Rescale(HEADS, KEYS, ~KEYS, 0.4),)

    def slopes(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.detach().to(dtype) for x in inputs())
        q[..., 0], k[..., 0] = 10.0, torch.where(KEYS[0], 11.5, 0.0)
        given = tuple(x.requires_grad_() for x in (q, k, v))
        z, _ = attend(*given, ScoreRule(0.5, Mask(6, 6, right=0)), edits, backend)
        return torch.autograd.grad(z[..., 0].sum(), given)

    for found, exact in zip(slopes(torch.float32), slopes(torch.float64), strict=True):
        torch.testing.assert_close(found, exact.float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_a_row_that_a_bias_empties_has_no_gradient(backend):
    q, k, v = inputs()
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[:, :, 2] = -torch.inf
    z, _ = attend(q, k, v, ScoreRule(0.5, Mask(6, 6), bias=bias), (), backend)
    for slope in torch.autograd.grad(z.sum(), (q, k, v)):
        assert slope.isfinite().all()
    assert (
        torch.autograd.grad(attend(q, k, v, ScoreRule(0.5, Mask(6, 6), bias=bias))[0].sum(), q)[0][:, :, 2]
        == 0
    ).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("backend", ["flash", "blocked"])
def test_attention_has_the_gradient_of_finite_differences(backend, scores, mask):
    if backend == "flash" and mask == "window":
        pytest.skip("the fused kernel refuses windows")
    rule = ScoreRule(0.5, MASKS[mask], edits=SCORES[scores])
    gate = torch.tensor([[1.0, 0.5, 0.0, -2.0]], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, gate):
        return Gate(gate).apply(attend(q, k, v, rule, (), backend)[0], torch.empty(0))

    assert torch.autograd.gradcheck(run, (*inputs(), gate), fast_mode=True)


@pytest.mark.parametrize("mask", MASKS)
def test_edited_weights_have_the_gradient_of_finite_differences(mask):
    rule = ScoreRule(0.5, MASKS[mask], sinks=torch.randn(4, dtype=torch.float64), edits=SCORES["scores"])
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, rule, WEIGHTS)[0], inputs(), fast_mode=True
    )


def test_flash_refuses_the_gradients_that_it_does_not_have():
    q, k, v = inputs()
    rule = ScoreRule(0.5, MASKS["causal"])
    with pytest.raises(ValueError, match="gradients of edited weights"):
        attend(q, k, v, rule, WEIGHTS, "flash")
    for wrong, message in (
        (replace(rule, sinks=torch.zeros(4)), "learned sinks"),
        (replace(rule, bias=torch.zeros(1, 1, 1, 6).requires_grad_()), "a score bias"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, wrong, (), "flash")
    with torch.no_grad():
        attend(q, k, v, rule, WEIGHTS, "flash")


@pytest.mark.parametrize("edits", [(), WEIGHTS], ids=["plain", "edited"])
@pytest.mark.parametrize(
    "name", ["lse", "entropy", "max", "distance", "first", "received", "row_mass", "mass"]
)
def test_statistics_of_a_differentiable_map(name, edits):
    """As functions of q and k, edits included; `argmax` and `visible` are whole numbers."""
    rule, groups = ScoreRule(0.5, MASKS["causal"]), torch.arange(6)[None] % 2 == 0

    def run(q, k, v):
        _, map = attend(q, k, v, rule, edits, differentiable=True)
        return map.statistic(name, groups).double()

    q, k, v = inputs()
    v = v.detach()
    # statistics come in float32: their slopes are compared with those of the reference map in float64
    found = torch.autograd.grad(run(q, k, v).sum(), (q, k))
    expected = torch.autograd.grad(_by_definition(name, q, k, edits, groups).sum(), (q, k))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-5)


def _by_definition(name, q, k, edits, groups):
    weights, lse = _dense(q, k, edits)
    apart = (torch.arange(6)[:, None] - torch.arange(6)).abs().double()
    return {
        "lse": lambda: lse,
        "entropy": lambda: -(weights * torch.where(weights > 0, weights, 1.0).log()).sum(-1),
        "max": lambda: weights.amax(-1),
        "distance": lambda: (weights * apart).sum(-1),
        "first": lambda: weights[..., 0],
        "received": lambda: weights.sum(-2),
        "row_mass": lambda: weights.sum(-1),
        "mass": lambda: weights @ groups.mT.double(),
    }[name]()


def _dense(q, k, edits):
    """The map and the log-sum-exp, with `WEIGHTS` written out, in operations whose slopes are finite everywhere."""
    scores = 0.5 * q @ k.repeat_interleave(2, 1).mT
    scores = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, -1e9)
    weights = scores.softmax(-1) * torch.ones(6, 6).tril()
    if edits:
        freed, target = 0.7 * (weights * KEYS).sum(-1), (weights * ~KEYS).sum(-1)
        acts = (target > 0) & HEADS[:, None]
        gain = 1 + freed / torch.where(acts, target, 1.0)
        moved = weights * torch.where(KEYS, 0.3, gain[..., None])
        weights = torch.where(acts[..., None], moved, weights)
        weights = torch.where(HEADS[:, None, None], weights, 0.8 * weights + 0.2 * torch.eye(6))
    return weights, scores.logsumexp(-1)


@pytest.mark.parametrize("edits", [(), WEIGHTS], ids=["plain", "edited"])
def test_products_of_a_differentiable_map(edits):
    rule = ScoreRule(0.5, MASKS["causal"])

    def run(q, k, x):
        _, map = attend(q, k, k, rule, edits, differentiable=True)
        return map @ x, map.T @ x, map.tile(slice(2, 5), slice(0, 4)).double()

    q, k, _ = inputs()
    x = torch.randn(2, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    one, other, tile = run(q, k, x)
    weights, _ = _dense(q, k, edits)
    for mine, exact in (
        (one, weights @ x),
        (other, weights.mT @ x),
        (tile, weights[:, :, 2:5, :4]),
    ):
        mix = torch.randn(exact.shape, dtype=torch.float64)
        found = torch.autograd.grad((mine * mix).sum(), (q, k, x), retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad((exact * mix).sum(), (q, k, x), retain_graph=True, allow_unused=True)
        for a, e in zip(found, expected, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("edits", [(), WEIGHTS], ids=["plain", "edited"])
def test_a_map_carries_no_gradient_unless_asked(edits):
    q, k, v = inputs()
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    rule = ScoreRule(0.5, MASKS["causal"], sinks=sinks)
    z, map = attend(q, k, v, rule, edits)
    assert z.requires_grad
    held = [map.q, map.k, map.lse, map.rule.sinks, *(f for step in map.steps for f in step.factors)]
    assert not any(x.requires_grad for x in held if x is not None)
    names = statistics.NAMES
    found = map.statistics(names, torch.ones(1, 6, dtype=torch.bool))
    assert not any(values.requires_grad for values in found.values())
    assert isinstance(map, AttentionMap)
    assert not (map @ v.detach().repeat_interleave(2, 1)).requires_grad


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
def test_gradients_of_head_gates_equal_those_of_eager_attention(architecture):
    """In a float64 model, whose eager softmax is in float32 still: its gates are factors before the output projection.

    Without padding, under which transformers' windowed eager attention is NaN in float64.
    """
    hf = tiny_models.tiny(architecture).double()
    ids, _ = tiny_models.batch(3, (17, 17))
    hf.set_attn_implementation("eager")
    gates = torch.ones(tiny_models.LAYERS, tiny_models.HEADS, dtype=torch.float64, requires_grad=True)
    layers = hf.transformer.h if architecture == "gpt2" else hf.model.layers
    for number, layer in enumerate(layers):
        projection = layer.attn.c_proj if architecture == "gpt2" else layer.self_attn.o_proj

        def gated(_, given, number=number):
            z = given[0]
            parts = z.unflatten(-1, (tiny_models.HEADS, -1)) * gates[number][:, None]
            return (parts.flatten(-2),)

        projection.register_forward_pre_hook(gated)
    weight = torch.randn(*ids.shape, tiny_models.VOCAB, dtype=torch.float64)
    expected = torch.autograd.grad((hf(ids).logits * weight).sum(), gates)[0]

    model = hw.load(tiny_models.tiny(architecture).double())
    mine = torch.ones(1, tiny_models.LAYERS, tiny_models.HEADS, dtype=torch.float64, requires_grad=True)
    with context.gated(model.key, mine):
        logits = model.hf(ids).logits
    found = torch.autograd.grad((logits * weight).sum(), mine)[0][0]
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
