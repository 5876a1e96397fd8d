"""BLOOM, MPT and Falcon: attention of their own code, edited in the caller's context.

The oracle is the plain model of transformers, whose own eager code runs: its softmax is changed by a torch function
mode for the length of a run, or the input of its output projection by a hook.

Seen to fail: ALiBi left out of the scores, Falcon's ALiBi added once in eager code, padding on the left taken for real,
grouped keys in another order, and the stand-ins taken off.
"""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode

import headwater as hw
from headwater.lens.attention import own_code

IDS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}),
    "falcon rotary": ("Falcon", FALCON),
    "falcon alibi": ("Falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "falcon grouped": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
}
HEADS = 4
MASK = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6, [1] * 5 + [0] * 4]).bool()
TOKENS = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(2))


def pair(name: str, code: str = "eager"):
    """The open model and the plain one, with weights that make attention far from uniform."""
    kind, config = KINDS[name]
    made = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    plain = made._from_config(made.config_class(**IDS, **config), attn_implementation=code).eval()
    with torch.no_grad():
        for key, weight in plain.named_parameters():
            if weight.dim() == 2 and "emb" not in key and "wte" not in key:
                weight.mul_(6)
    return hw.load(copy.deepcopy(plain)), plain


class Softmax(TorchFunctionMode):
    """The scores [batch, head, query, key] of every softmax go through `scores` before and `weights` after it."""

    def __init__(self, scores=lambda s: s, weights=lambda w: w) -> None:
        self.scores, self.weights = scores, weights

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.softmax:
            return func(*args, **(kwargs or {}))
        return self.weights(func(self.scores(args[0]), *args[1:], **(kwargs or {})))


def logits(plain, mask=MASK, mode=None, **more):
    with torch.no_grad(), mode if mode is not None else Softmax():
        return plain(TOKENS, attention_mask=mask.long(), **more).logits[mask]


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_weights_are_those_of_their_own_code(name: str) -> None:
    model, plain = pair(name)
    assert model.read_only == ""
    torch.testing.assert_close(model(TOKENS, MASK)[MASK], logits(plain), atol=2e-5, rtol=1e-4)
    seen: list[torch.Tensor] = []
    logits(plain, mode=Softmax(weights=lambda w: seen.append(w) or w))
    record = model.record(TOKENS, MASK)
    for layer, weights in enumerate(seen):
        torch.testing.assert_close(
            record.pattern(layer), weights * MASK[:, None, :, None], atol=1e-5, rtol=1e-4
        )


def test_falcon_adds_alibi_once_on_sdpa() -> None:
    model, plain = pair("falcon alibi", "sdpa")
    torch.testing.assert_close(model(TOKENS, MASK)[MASK], logits(plain), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_edits_of_scores_weights_and_outputs_are_hooks_by_hand(name: str) -> None:
    model, plain = pair(name)
    least = torch.finfo(torch.float32).min

    def biased(scores):
        first = MASK.long().argmax(1)  # position 0 is the first real token
        at = F.one_hot(first, 9)[:, None, None].bool() & (scores > least / 2)
        return torch.where(at, scores + 1.5, scores)

    with model.edit(hw.BiasKeys(keys=0, bias=1.5)):
        found = model(TOKENS, MASK)[MASK]
    expected = logits(plain, mode=Softmax(biased))
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
    assert (expected - logits(plain)).abs().max() > 1e-3

    with model.edit(hw.Temperature(0.5)):
        found = model(TOKENS, MASK)[MASK]
    halved = Softmax(lambda s: torch.where(s > least / 2, s * 0.5, s))
    torch.testing.assert_close(found, logits(plain, mode=halved), atol=5e-5, rtol=1e-4)

    def uniform(weights):
        seen = (weights > 0).float()
        return 0.5 * weights + 0.5 * seen / seen.sum(-1, keepdim=True)

    with model.edit(hw.TowardUniform(amount=0.5)):
        found = model(TOKENS, MASK)[MASK]
    torch.testing.assert_close(found, logits(plain, mode=Softmax(weights=uniform)), atol=5e-5, rtol=1e-4)

    width = 32 // HEADS
    path = next(
        path
        for path, _ in plain.named_modules()
        if path.endswith(("1.self_attention.dense", "1.attn.out_proj"))
    )

    def silent(module, args):
        z = args[0].clone()
        z[..., 2 * width : 3 * width] = 0
        return (z,)

    handle = plain.get_submodule(path).register_forward_pre_hook(silent)
    with model.edit(hw.ScaleHeads({"1.2": 0.0})):
        found = model(TOKENS, MASK)[MASK]
    torch.testing.assert_close(found, logits(plain), atol=2e-5, rtol=1e-4)
    handle.remove()


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_and_padding_change_nothing_of_an_edited_text(name: str) -> None:
    model, plain = pair(name)
    with model.edit(hw.Temperature(0.3), hw.ScaleHeads({"0.1": 0.0})):
        new = model.generate(TOKENS[:1], max_new_tokens=4)
        whole = model(new[:, :-1]).argmax(-1)
    assert new[0, 9:].tolist() == whole[0, 8:].tolist()
    ours = model.generate(TOKENS[:2], 4, MASK[:2], min_new_tokens=4)
    with torch.no_grad():
        own = plain.generate(
            TOKENS[:2], attention_mask=MASK[:2].long(), max_new_tokens=4, min_new_tokens=4, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert ours[:, 9:].tolist() == own[:, 9:].tolist()


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon alibi"])
def test_gradients_of_head_gates_are_those_of_a_hook(name: str) -> None:
    model, plain = pair(name)
    gates = torch.ones(1, 2, HEADS, requires_grad=True)
    with model.gated(gates):
        model(TOKENS, MASK)[MASK].pow(2).sum().backward()
    own = torch.ones(2, HEADS, requires_grad=True)
    for layer in range(2):
        ends = (f"{layer}.self_attention.dense", f"{layer}.attn.out_proj")
        output = next(module for path, module in plain.named_modules() if path.endswith(ends))
        output.register_forward_pre_hook(
            lambda module, args, layer=layer: (
                (args[0].unflatten(-1, (HEADS, -1)) * own[layer][:, None]).flatten(-2),
            )
        )
    plain(TOKENS, attention_mask=MASK.long()).logits[MASK].pow(2).sum().backward()
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad[0], own.grad, atol=1e-3, rtol=1e-3)


def test_copies_threads_and_failures_leave_the_model_as_it_is() -> None:
    model, plain = pair("bloom")
    expected = logits(plain)
    with model.edit(hw.Temperature(0.0)), ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(
            pool.submit(lambda: model(TOKENS, MASK)[MASK]).result(), expected, atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(copy.deepcopy(model)(TOKENS, MASK)[MASK], expected, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(model(TOKENS, MASK)[MASK], expected, atol=1e-3)
    copied = pickle.loads(pickle.dumps(model.hf))
    assert own_code.is_met(copied)
    with pytest.raises(IndexError):
        model.hf(torch.tensor([[999]]))
    assert own_code._running.get() == ()
    assert not any("forward" in vars(module) for module in model.hf.modules())


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon rotary"])
def test_weights_per_head_make_the_heads_outputs(name: str) -> None:
    model, _ = pair(name)
    weights, seen = model.weights(0), {}
    attention = model.attention_module(0)
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(x=args[0]), with_kwargs=True)
    z = model.head_outputs(TOKENS)[:, 0]
    value = torch.einsum("bpd,hde->bhpe", seen["x"], weights.W_V) + (
        0 if weights.b_V is None else weights.b_V[None, :, None]
    )
    map = model.record(TOKENS).pattern(0)
    torch.testing.assert_close(map @ value, z, atol=2e-5, rtol=1e-4)
