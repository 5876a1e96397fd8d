"""TransformerLens' own `patching` and `head_detector` on a HookedModel, against the same calls on a bridge.

Seen to fail when: `cfg.n_ctx` is one too small.
"""

from __future__ import annotations

import warnings
from functools import cache as remembered
from typing import Any

import pytest
import torch
from bridged import MISSING, both, quietly

import headwater as hw

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TransformerLens' own dependencies say while they are imported
    pytest.importorskip("transformer_lens", reason=MISSING)
    from transformer_lens import head_detector, patching
    from transformer_lens.model_protocol import TransformerLensModel

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "gpt_neox")
CLEAN = torch.tensor([[5, 17, 30, 8], [40, 9, 3, 77]])
CORRUPT = torch.tensor([[5, 22, 30, 61], [40, 50, 3, 12]])
SWEEPS = sorted(
    n for n in dir(patching) if n.startswith("get_act_patch_") and "direct_path" not in n and "every" not in n
)


@remembered
def pair(name: str) -> tuple[hw.HookedModel, Any]:
    plain, bridge = both(name)
    return hw.load(plain), bridge


def metric(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, 11] - logits[:, -1, 40]).mean()


def swept(model: Any, sweep: Any) -> torch.Tensor:
    _, clean = quietly(model.run_with_cache, CLEAN)
    return quietly(sweep, model, CORRUPT, clean, metric)


def test_a_model_is_what_transformer_lens_asks_for() -> None:
    model, bridge = pair("llama")
    assert isinstance(model, TransformerLensModel)
    for field in (
        "n_layers", "n_heads", "n_key_value_heads", "n_ctx", "d_model", "d_head", "d_mlp", "d_vocab", "device",
        "dtype", "act_fn", "normalization_type", "positional_embedding_type", "eps",
    ):  # fmt: skip
        assert getattr(model.cfg, field) == getattr(bridge.cfg, field), field
    assert pair("gpt2")[0].cfg.n_key_value_heads == pair("gpt2")[1].cfg.n_key_value_heads


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_of_patching(sweep: str) -> None:
    """Grouped queries: k and v are swept per key–value head."""
    model, bridge = pair("llama")
    found, expected = (swept(m, getattr(patching, sweep)) for m in (model, bridge))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert found.std() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("sweep", ["get_act_patch_attn_head_all_pos_every", "get_act_patch_block_every"])
def test_sweeps_on_other_families(name: str, sweep: str) -> None:
    model, bridge = pair(name)
    found, expected = (swept(m, getattr(patching, sweep)) for m in (model, bridge))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_results_with_a_baseline() -> None:
    model, bridge = pair("gpt2")

    def sweep(*given: Any) -> Any:
        return patching.get_act_patch_resid_pre(
            *given[:3], lambda x: x[:, -1, 11], reduce="none", baseline=True
        )

    found, expected = swept(model, sweep), swept(bridge, sweep)
    torch.testing.assert_close(found.values, expected.values, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.baseline, expected.baseline, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("previous_token_head", "mul"),
        ("duplicate_token_head", "mul"),
        ("induction_head", "mul"),
        ("induction_head", "abs"),
    ],
)
def test_head_detector(kind: str, measure: str) -> None:
    """On tokens that a stand-in for a tokenizer gives to both, so that nothing but the patterns can differ."""
    ids = torch.tensor([[4, 9, 30, 4, 9, 30, 71, 4]])
    for name in FAMILIES:
        model, bridge = pair(name)
        found, expected = (
            quietly(head_detector.detect_head, Given(m, ids), "a text", kind, error_measure=measure)
            for m in (model, bridge)
        )
        torch.testing.assert_close(found, expected, atol=2e-3 if measure == "abs" else 1e-5, rtol=1e-4)


class Given:
    """A model whose texts are these tokens; all else is the model's own."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def to_tokens(self, text: str) -> torch.Tensor:
        return self.model.to_tokens(self.ids) if isinstance(self.model, hw.HookedModel) else self.ids


def test_head_detector_on_a_trained_model() -> None:
    """The embedded task model, its own tokenizer, the call as a user writes it: the score is a share of the pattern."""
    model = hw.load("tasks-4l")
    text = "When Mary and John went to the store , John gave a drink to"
    found = quietly(head_detector.detect_head, model, text, "previous_token_head")
    record = model.record(text)
    for layer in model.layers:
        pattern = record.pattern(layer)[0]
        share = pattern.diagonal(-1, 1, 2).sum(-1) / pattern.sum((1, 2))
        torch.testing.assert_close(found[layer], share, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("place", [-1, slice(1, 3), (0, 3), [0, 2]])
def test_accumulated_streams_through_the_last_norm(family: str, place: Any) -> None:
    """The logit lens of TransformerLens on a cache of ours, cut to positions before or after."""
    model, bridge = pair(family)
    found, expected = (quietly(m.run_with_cache, CLEAN)[1] for m in (model, bridge))
    ours, theirs = (c.accumulated_resid(layer=-1, apply_ln=True, pos_slice=place) for c in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain, raw = (c.accumulated_resid(layer=-1, pos_slice=place) for c in (found, expected))
    torch.testing.assert_close(plain, raw, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1
    cut, other = (quietly(m.run_with_cache, CLEAN, pos_slice=place)[1] for m in (model, bridge))
    for name in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.attn.hook_pattern"):
        assert cut[name].shape == other[name].shape
        torch.testing.assert_close(cut[name], other[name], rtol=1e-4, atol=1e-4)
