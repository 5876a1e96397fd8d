"""Held to TransformerLens itself: what a bridge gives, Headwater gives, and a bridge that was opened stays as it was.

Where a bridge is known to give something else, the test says what: delegating bridges (OPT, BERT) discard changed
patterns and show patterns under the name of scores; where it reads `hook_resid_mid` it does not change the stream.
Seen to fail when: the model inside shares its configuration with the bridge; masked scores are -inf where a bridge has
the least number; fused projections are taken apart as several views, which autograd refuses to write through.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bridged import MISSING, both, bridge_of, quietly, varied
from torch import Tensor

import headwater as hw
from headwater.lens.errors import ModelError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TransformerLens' own dependencies say while they are imported
    pytest.importorskip("transformer_lens", reason=MISSING)

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "gpt_neox")
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss", "qwen3", "gemma3"])
def test_every_activation_is_a_bridges(name: str) -> None:
    plain, bridge = both(name)
    logits, expected = quietly(bridge.run_with_cache, IDS)
    found, cache = hw.load(plain).run_with_cache(IDS)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
    shared = [n for n in cache if n in expected.cache_dict]
    assert len(shared) > 30
    own = {n.rpartition(".")[2] for n in cache if n not in shared}
    assert own <= {"hook_rot_q", "hook_rot_k"}  # a bridge of GPT-NeoX does not give them
    for n in shared:
        torch.testing.assert_close(
            cache[n], expected[n], atol=1e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}"
        )
    torch.testing.assert_close(cache["pattern", -1], expected["pattern", -1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_changed_activation_does_what_it_does_in_a_bridge(name: str) -> None:
    plain, bridge = both(name)
    model = hw.load(plain)
    logits, cache = model.run_with_cache(IDS)
    reached = quietly(bridge.run_with_cache, IDS)[1].cache_dict
    for number, n in enumerate(n for n in cache if n in reached):
        noise = 0.1 * torch.randn(cache[n].shape, generator=torch.Generator().manual_seed(number))

        def change(tensor: Tensor, hook: Any, noise: Tensor = noise, n: str = n) -> Tensor:
            return (tensor + noise).tril() if n.endswith("hook_pattern") else tensor + noise

        found = model.run_with_hooks(IDS, fwd_hooks=[(n, change)])
        expected = quietly(bridge.run_with_hooks, IDS, fwd_hooks=[(n, change)])
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")
        assert (found - logits).abs().max() > 1e-5, n


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_are_a_bridges(name: str) -> None:
    plain, bridge = both(name)
    inside = [f"attn.hook_{n}" for n in ("q", "k", "v", "z", "pattern")]
    names = [f"blocks.{layer}.{n}" for layer in (0, 1) for n in (*inside, "hook_resid_pre", "hook_mlp_out")]
    loss, expected = quietly(
        bridge.run_with_cache, IDS, names_filter=names, incl_bwd=True, return_type="loss"
    )
    found, cache = hw.load(plain).run_with_cache(IDS, names_filter=names, incl_bwd=True)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-4)
    for n in names:
        torch.testing.assert_close(cache[f"{n}_grad"], expected[f"{n}_grad"], atol=1e-6, rtol=1e-3)


def test_a_bridge_tracks_gradients_and_headwater_does_not() -> None:
    plain, bridge = both("llama")
    assert quietly(bridge.run_with_cache, IDS)[0].requires_grad
    model = hw.load(plain)
    assert not model.run_with_cache(IDS)[0].requires_grad
    assert model.run_with_cache(IDS, grad=True)[0].requires_grad


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_delegating_bridges_discard_what_headwater_does(name: str) -> None:
    plain, bridge = both(name)
    logits, expected = quietly(bridge.run_with_cache, IDS, output_attentions=True)
    model = hw.load(plain)
    _, cache = model.run_with_cache(IDS)
    pattern, scores = ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores")
    zero = [(pattern, lambda tensor, hook: tensor * 0)]
    if pattern in expected.cache_dict:  # eager: then what is called scores are the weights
        torch.testing.assert_close(cache[pattern], expected[pattern], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(expected[scores], expected[pattern], atol=0, rtol=0)
    assert (quietly(bridge.run_with_hooks, IDS, fwd_hooks=zero) - logits).abs().max() == 0
    torch.testing.assert_close(cache[scores].softmax(-1), cache[pattern], atol=1e-6, rtol=1e-5)
    assert (model.run_with_hooks(IDS, fwd_hooks=zero) - logits).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "opt", "gpt_oss", "bert", "llama4", "deepseek_v3"])
def test_the_model_inside_is_opened_and_the_bridge_stays_as_it_was(name: str) -> None:
    plain = varied(name)
    with torch.no_grad():
        untouched = plain(IDS).logits
    bridge = bridge_of(plain)
    assert type(next(iter(bridge.blocks))).__module__.startswith("transformer_lens")
    assert bridge.original_model is plain  # a bridge puts its modules into the very model it is given
    before, cache = quietly(bridge.run_with_cache, IDS)
    model = hw.load(bridge)
    torch.testing.assert_close(model(IDS), untouched, atol=1e-5, rtol=1e-4)
    assert {id(p) for p in model.hf.parameters()} <= {id(p) for p in plain.parameters()}
    record = model.record(IDS)
    with model.edit(hw.ScaleHeads({"1.1": 0.0})):
        assert (model(IDS) - untouched).abs().max() > 1e-3
        during = quietly(bridge.run_with_cache, IDS)[0]
    after, again = quietly(bridge.run_with_cache, IDS)
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert list(cache.keys()) == list(again.keys())
    assert all(torch.equal(cache[n], again[n]) for n in cache.keys())  # noqa: SIM118 - an ActivationCache
    if "blocks.1.attn.hook_pattern" in cache.cache_dict and name not in ("bert",):
        torch.testing.assert_close(
            record.pattern(1), cache["blocks.1.attn.hook_pattern"], atol=1e-5, rtol=1e-4
        )
    assert hw.load(plain).record(IDS).pattern(0).shape == (
        2,
        4,
        9,
        9,
    )  # the model a bridge has taken, given itself


def test_a_bridge_with_rewritten_weights() -> None:
    """Compatibility mode folds and centres: a model opened before keeps the weights it was opened with."""
    plain = varied("gpt2")
    with torch.no_grad():
        untouched = plain(IDS).logits
    bridge = bridge_of(plain)
    model = hw.load(bridge)
    quietly(bridge.enable_compatibility_mode)
    torch.testing.assert_close(model(IDS), untouched, atol=1e-5, rtol=1e-4)
    try:
        late = hw.load(bridge)
    except ModelError as refused:
        assert "says something else than the bridge" in str(refused)  # noqa: PT017 - either is right
    else:
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(late(IDS).log_softmax(-1), untouched.log_softmax(-1), **close)


def test_bridges_that_can_not_be_opened_are_refused() -> None:
    _, bridge = both("llama")
    bridge.train()
    with pytest.raises(ModelError, match="training mode"):
        hw.load(bridge)
    bridge.eval()
    handle = bridge.original_model.model.norm.register_forward_hook(lambda m, a, o: o * 2)
    with pytest.raises(ModelError, match="says something else than the bridge"):
        hw.load(bridge)
    handle.remove()
    opened = hw.load(varied("llama"))
    late = bridge_of(opened.hf)
    with pytest.raises(ModelError, match="make the bridge of the model first"):
        hw.load(late)
    with pytest.raises(ModelError):  # nothing is recorded in silence where the bridge's attention runs
        opened.record(IDS)
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(
        d_model=32, d_head=8, n_layers=1, n_heads=4, n_ctx=16, d_vocab=50, act_fn="gelu", seed=0
    )
    with pytest.raises(ModelError, match="not a transformers model"):
        hw.load(quietly(TransformerBridge.boot_native, config))


def test_boot_transformers_brings_another_tokenizer(tmp_path: Path) -> None:
    """It loads the tokenizer anew, so that a text begins with the first token; `tokenizer=` keeps one's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(90))]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    plain = varied("llama")
    bridge = quietly(TransformerBridge.boot_transformers, "any", hf_model=plain, tokenizer=own, device="cpu")
    assert bridge.tokenizer is not own
    model = hw.load(bridge)
    assert model.to_tokens("w1 w2").tolist() == bridge.to_tokens("w1 w2").tolist() == [[1, 4, 5]]
    assert hw.load(bridge, tokenizer=own).to_tokens("w1 w2").tolist() == [[4, 5]]
    torch.testing.assert_close(model("w1 w2 w7"), quietly(bridge, "w1 w2 w7"), atol=1e-5, rtol=1e-4)


def test_left_padding_counts_positions_as_a_bridge_does() -> None:
    plain, bridge = both("gpt2")
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :3], mask[1, :3] = 0, 0
    found = hw.load(plain)(ids, mask)
    expected = quietly(bridge, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
