"""Head importance against finite differences and hooks on the output projection of an untouched model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import headwater as hw
from headwater.analyses.heads.head_importance import head_importance
from headwater.lens.errors import AnalysisError, HeadwaterError

PROJECTION = {"gpt2": "c_proj", "llama": "o_proj", "gemma2": "o_proj", "gpt_oss": "o_proj"}
HEADS = 4


def projections(model: nn.Module, name: str) -> list[nn.Module]:
    return [m for path, m in model.named_modules() if path.endswith(f"attn.{name}")]


@contextmanager
def scaled(modules: list[nn.Module], gates: Tensor):
    """Multiply each head's output before the projection by gates [layer, head] of a plain model."""

    def hook(layer: int):
        def scale(module, args):
            z = args[0].unflatten(-1, (HEADS, -1)) * gates[layer][:, None]
            return (z.flatten(-2), *args[1:])

        return scale

    handles = [module.register_forward_pre_hook(hook(layer)) for layer, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def next_token_loss(twin: nn.Module, ids: Tensor) -> Tensor:
    logits = twin(ids[None]).logits[0].double()
    return nn.functional.cross_entropy(logits[:-1], ids[1:])


def slope(modules: list[nn.Module], layer: int, head: int, value: Callable[[], Tensor]) -> float:
    """The slope of a value in one gate by differences of five points.

    Norms and softmaxes of the twin compute in float32: its loss is known to some 2e-7, and a slope to 3e-5. The formula
    itself is off by step⁴. With two points no step keeps both below that.
    """
    step, found = 1e-2, 0.0
    gates = torch.ones(len(modules), HEADS, dtype=torch.float64)
    for steps, weight in ((2, -1), (1, 8), (-1, -8), (-2, 1)):
        gates[layer, head] = 1 + steps * step
        with torch.no_grad(), scaled(modules, gates):
            found += weight * float(value()) / (12 * step)
    return found


def example_slopes(twin: nn.Module, modules: list[nn.Module], texts: list[Tensor]) -> np.ndarray:
    """The slopes of each text's loss in each gate, [text, layer, head]."""
    slopes = np.zeros((len(texts), len(modules), HEADS))
    for b, layer, head in np.ndindex(slopes.shape):
        slopes[b, layer, head] = slope(modules, layer, head, lambda b=b: next_token_loss(twin, texts[b]))
    return slopes


TEXTS = [
    torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(seed))
    for seed, n in enumerate((6, 9, 6, 4))
]
WRITTEN = [" ".join(f"w{token}" for token in text.tolist()) for text in TEXTS]


@pytest.mark.parametrize("name", list(PROJECTION))
def test_gradient_is_the_finite_difference(pairs: Callable, name: str) -> None:
    """Texts of three lengths, in an order that batching by length does not keep."""
    pair = pairs(name)
    modules = projections(pair.twin, PROJECTION[name])
    expected = np.abs(example_slopes(pair.twin, modules, TEXTS))
    found = head_importance(pair.model, WRITTEN, per_example=True)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-5)
    mean = head_importance(pair.model, WRITTEN, batch_size=1)
    assert mean.dims == ("layer", "head")
    np.testing.assert_allclose(mean, expected.mean(0), rtol=5e-3, atol=5e-5)


def test_granularity_takes_the_absolute_value_in_its_place(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.stack([TEXTS[0], TEXTS[2]])
    slopes = example_slopes(pair.twin, projections(pair.twin, "o_proj"), list(ids))
    whole = head_importance(pair.model, ids, granularity="batch")
    np.testing.assert_allclose(whole, np.abs(slopes.mean(0)), rtol=5e-3, atol=5e-5)
    token = head_importance(pair.model, ids, granularity="token")
    np.testing.assert_allclose(token, token_slopes(pair.twin, list(ids)), rtol=5e-3, atol=5e-6)


def token_slopes(twin: nn.Module, texts: list[Tensor]) -> np.ndarray:
    """Σ |z·∂loss/∂z| over texts and positions by backward hooks, divided by the number of tokens."""
    modules = projections(twin, "o_proj")
    total, tokens = torch.zeros(len(modules), HEADS, dtype=torch.float64), 0
    for text in texts:
        kept: dict[int, Tensor] = {}

        def keep(layer: int, kept: dict[int, Tensor] = kept):
            def hook(module, args):
                args[0].retain_grad()
                kept[layer] = args[0]

            return hook

        handles = [module.register_forward_pre_hook(keep(layer)) for layer, module in enumerate(modules)]
        next_token_loss(twin, text).backward()
        for handle in handles:
            handle.remove()
        twin.zero_grad()
        for layer, z in kept.items():
            total[layer] += (z * z.grad)[0].detach().unflatten(-1, (HEADS, -1)).sum(-1).abs().sum(0)
        tokens += len(text)
    return (total / tokens).numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_zero_ablation_is_the_loss_without_the_head(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    modules = projections(pair.twin, PROJECTION[name])
    expected = np.zeros((len(TEXTS), 3, HEADS))
    with torch.no_grad():
        for b, text in enumerate(TEXTS):
            for layer, head in np.ndindex(3, HEADS):
                gates = torch.ones(3, HEADS, dtype=torch.float64)
                gates[layer, head] = 0
                with scaled(modules, gates):
                    expected[b, layer, head] = next_token_loss(pair.twin, text)
            expected[b] -= float(next_token_loss(pair.twin, text))
    found = head_importance(pair.model, WRITTEN, how="ablation", per_example=True)
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_mean_ablation_replaces_by_the_mean_output(pairs: Callable) -> None:
    """The mean of z over the positions of all examples, put in place by hand."""
    pair = pairs("llama")
    modules = projections(pair.twin, "o_proj")
    outputs: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: outputs[layer].append(args[0][0]))
        for layer, module in enumerate(modules)
    ]
    with torch.no_grad():
        base = [float(next_token_loss(pair.twin, text)) for text in TEXTS]
    for handle in handles:
        handle.remove()
    means = [torch.cat(z).mean(0).unflatten(-1, (HEADS, -1)) for z in outputs]
    expected = np.zeros((3, HEADS))
    for layer, head in np.ndindex(3, HEADS):

        def put(module, args, layer=layer, head=head):
            z = args[0].unflatten(-1, (HEADS, -1)).clone()
            z[..., head, :] = means[layer][head]
            return (z.flatten(-2), *args[1:])

        handle = modules[layer].register_forward_pre_hook(put)
        with torch.no_grad():
            after = [float(next_token_loss(pair.twin, text)) for text in TEXTS]
        handle.remove()
        expected[layer, head] = np.mean(np.subtract(after, base))
    found = head_importance(pair.model, WRITTEN, how="ablation", ablation="mean")
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_resampling_depends_on_the_seed_alone(pairs: Callable) -> None:
    model = pairs("gpt2").model
    ids = torch.stack([TEXTS[0], TEXTS[2], TEXTS[0].roll(2)])
    first, again, other = (
        head_importance(model, ids, how="ablation", ablation="resample", seed=seed) for seed in (3, 3, 5)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_layer_norm_of_the_scores(pairs: Callable) -> None:
    model = pairs("llama").model
    plain = head_importance(model, WRITTEN)
    found = head_importance(model, WRITTEN, normalise="layer")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-6)


def test_a_loss_of_ones_own_and_no_trace_left(pairs: Callable) -> None:
    """Importance of a loss with a closed form: the sum of all logits is linear, its slope in no gate is
    NaN."""
    pair = pairs("llama")
    before = pair.model(TEXTS[0][None])
    found = head_importance(pair.model, WRITTEN, loss=lambda logits, tokens: logits[:, -1, 5])
    modules = projections(pair.twin, "o_proj")
    slopes = [
        slope(modules, 1, 2, lambda text=text: pair.twin(text[None]).logits[0, -1, 5]) for text in TEXTS
    ]
    assert float(found[1, 2]) == pytest.approx(np.abs(slopes).mean(), rel=5e-3)
    assert torch.equal(pair.model(TEXTS[0][None]), before)
    assert all(parameter.grad is None for parameter in pair.model.hf.parameters())


def test_an_edit_around_it_is_part_of_the_model(pairs: Callable) -> None:
    """With a head scaled to zero its gate has no slope."""
    model = pairs("llama").model
    with model.edit(hw.ScaleHeads({"1.2": 0.0})):
        found = head_importance(model, WRITTEN)
    assert float(found[1, 2]) == 0
    assert float(found[1, 1]) > 0
    assert "ScaleHeads" in str(found.attrs["edits"])


def test_refusals(pairs: Callable) -> None:
    model = pairs("llama").model
    for settings, message in (
        ({"how": "shapley"}, "how='shapley'"),
        ({"normalise": "model"}, "normalise='model'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"loss": lambda logits, tokens: logits.mean()}, r"shape \(1,\)"),
        ({"loss": lambda logits, tokens: logits[:, 0, 0] / 0}, "finite"),
        ({"granularity": "batch", "per_example": True}, "no value per example"),
    ):
        with pytest.raises(AnalysisError, match=message):
            head_importance(model, WRITTEN, **settings)
    with pytest.raises(AnalysisError, match="examples is empty"):
        head_importance(model, [])
    with pytest.raises(AnalysisError, match=r"example 0: .*two tokens"):
        head_importance(model, ["w5", "w4 w9"])


def test_an_encoder_needs_an_embedding_measure(minilm) -> None:
    """Without a language head the loss is of hidden states: here 1 - cosine to the clean [CLS] embedding."""
    texts = ["The cat sat on the mat .", "Rain fell ."]
    with pytest.raises(HeadwaterError, match="no next-token loss"):
        head_importance(minilm.model, texts)
    tokens = minilm.model.to_tokens(texts)
    clean = minilm.model.embeddings(tokens).detach()[:, 0]
    by_length = {int(mask.sum()): row for mask, row in zip(tokens.mask, clean, strict=True)}

    def moved(hidden: Tensor, ids: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(hidden[:, 0], by_length[ids.shape[1]][None], dim=-1)

    found = head_importance(minilm.model, texts, how="ablation", loss=moved, per_example=True)
    assert found.dims == ("batch", "layer", "head")
    # by hand: zero head 2.3 of the twin on the first text
    layer = minilm.twin.encoder.layer[2].attention.output.dense
    ids = tokens.ids[:1, : int(tokens.mask[0].sum())]

    def drop(module, args):
        z = args[0].clone()
        z[..., 3 * 32 : 4 * 32] = 0
        return (z,)

    with torch.no_grad():
        before = minilm.twin(ids).last_hidden_state[0, 0]
        handle = layer.register_forward_pre_hook(drop)
        after = minilm.twin(ids).last_hidden_state[0, 0]
        handle.remove()
    expected = 1 - torch.cosine_similarity(before, after, dim=0)
    assert float(found[0, 2, 3]) == pytest.approx(float(expected), abs=1e-5)


def test_the_last_layer_divided_by_examples(pairs: Callable) -> None:
    """As released: every layer's sum over tokens, of which the last is divided by the number of examples."""
    model = pairs("llama").model
    asked = {"granularity": "token", "normalise": "last_layer_by_examples"}
    found, plain = (
        head_importance(model, WRITTEN, **asked),
        head_importance(model, WRITTEN, granularity="token"),
    )
    tokens = sum(map(len, TEXTS))
    np.testing.assert_allclose(found[:-1], plain[:-1])
    np.testing.assert_allclose(found[-1] * len(TEXTS), plain[-1] * tokens)
    for more in ({"granularity": "example"}, {"how": "ablation"}, {"per_example": True}):
        with pytest.raises(AnalysisError, match="last_layer_by_examples"):
            head_importance(model, WRITTEN, **asked | more)


def test_the_signed_slope_is_the_rise_of_the_loss_to_first_order(pairs: Callable) -> None:
    pair = pairs("gpt2")
    found = head_importance(pair.model, WRITTEN[:1], signed=True)
    modules = projections(pair.twin, PROJECTION["gpt2"])
    expected = example_slopes(pair.twin, modules, TEXTS[:1])[0]
    np.testing.assert_allclose(found.values, -expected, atol=5e-5)
    assert (found.values < 0).any()
    assert (found.values > 0).any()
    with pytest.raises(AnalysisError, match="signed"):
        head_importance(pair.model, WRITTEN[:1], how="ablation", signed=True)
