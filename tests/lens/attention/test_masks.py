"""Masks of every kind against dense attention: windows, chunks, padding on either side, growing and static caches.

They reach attention by the functions that transformers calls (`function.py`). Seen to fail: `key_offset` of a mask
ignored, a window wider by one (the guard in masks.band off), the padding of `valid_keys` left out, what a mask function
adds to its band (Llama 4's chunks) left out, a mask that static caches can not carry.
"""

from __future__ import annotations

import copy

import pytest
import torch
from part_oracle import PartOracle

import headwater as hw
from headwater.lens.attention import context
from headwater.lens.attention.masks import LazyMask, lazy_mask
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo

MASKED = (
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "llama4",
    "modernbert",
    "bert",
    "gpt_neox",
    "opt",
)
CACHED = ("llama", "mistral", "gemma3", "gpt_oss", "llama4", "t5", "bart", "whisper")


class Steps:
    """Listener that keeps the dense map of every call, by layer."""

    def __init__(self, key: object) -> None:
        self.model, self.statistics, self.grad = key, (), False
        self.maps: dict[int, list[torch.Tensor]] = {}
        self.spans: list[tuple[int, int]] = []

    def take(self, layer, map, value, output) -> None:
        self.maps.setdefault(layer, []).append(map.dense())
        self.spans.append((map.rule.mask.query_offset, map.rule.mask.key_offset))


def pair(name):
    dense = zoo.build(name)
    return hw.load(copy.deepcopy(dense)), dense


def padded(length, side):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    return mask if side != "none" else torch.ones_like(mask)


def layer_of(model, oracle):
    """Layer → the oracle's weights of that layer's first call."""
    paths = {module: path for path, module in model.hf.named_modules()}
    return {layer: oracle.maps[paths[model.attention_module(layer)]][0] for layer in model.layers}


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", MASKED)
def test_logits_and_patterns_under_windows_and_padding(name, side):
    model, dense = pair(name)
    ids = zoo.inputs(name, lengths=(23, 23))["input_ids"]
    mask = padded(23, side)
    given = {"input_ids": ids, "attention_mask": mask}
    if side == "left" and name != "opt":  # it counts positions from the mask by itself
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if name == "modernbert":
        given["position_ids"] = given.get("position_ids", torch.arange(23).expand(2, -1))
    oracle = PartOracle()
    expected = oracle.run(dense, lambda m: m(**given)).logits
    real = mask.bool()
    torch.testing.assert_close(model(ids, mask)[real], expected[real], atol=2e-5, rtol=1e-4)
    record = model.record(ids, mask)
    for layer, weights in layer_of(model, oracle).items():
        weights = weights * mask[:, None, :, None]
        torch.testing.assert_close(record.pattern(layer).double(), weights, atol=2e-6, rtol=1e-4)
        seen = (weights > 0).sum(-2)
        position = record.layers.index(layer)
        assert torch.from_numpy(record.statistic("visible").values)[:, position].equal(seen)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CACHED)
def test_every_step_of_generation_has_the_weights_of_dense_attention(name, cache):
    model, dense = pair(name)
    given = zoo.inputs(name)
    given.pop("decoder_input_ids", None)
    if "attention_mask" in given and name != "t5":
        given["attention_mask"] = padded(11, "left")
    settings = {
        "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2,
    } | ({"cache_implementation": "static"} if cache == "static" else {})  # fmt: skip
    oracle = PartOracle()
    expected = oracle.run(dense, lambda m: m.generate(**given, **settings))
    for part_name in model.parts:
        part = model.part(part_name)
        steps = Steps(part.key)
        with context.listening(steps), torch.no_grad():
            assert model.hf.generate(**given, **settings).equal(expected)
        paths = {module: path for path, module in model.hf.named_modules()}
        for layer, maps in steps.maps.items():
            every = oracle.maps[paths[part.attention_module(layer)]]
            assert len(maps) == len(every)
            for found, weights in zip(maps, every, strict=True):
                real = found.sum(-1, keepdim=True) > 0  # rows of padding have no weights here
                both = min(found.shape[-1], weights.shape[-1])
                assert not weights[..., both:].any()
                assert not found[..., both:].any()
                close = (found[..., :both].double() - weights[..., :both]).abs() * real
                assert close.max() < 2e-6
    if name == "mistral" and cache == "dynamic":
        assert any(key > 0 for _, key in steps.spans), (
            "the cache must have dropped keys, or nothing was tested"
        )


@pytest.mark.parametrize("name", ["gpt2", "llava", "t5", "whisper", "gemma3"])
def test_generating_through_the_model_is_transformers_own(name):
    model, dense = pair(name)
    given = zoo.inputs(name)
    given.pop("decoder_input_ids", None)
    if name == "gpt2":
        given["attention_mask"] = padded(11, "left")
    expected = dense.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    assert model.generate(ids, 6, attention_mask=mask, **given).equal(expected)


def test_a_mask_that_a_model_computes_with_is_an_error_and_never_a_wrong_mask():
    mask = lazy_mask(2, 4, 4)
    assert isinstance(mask, LazyMask)
    assert (tuple(mask.shape), mask.contiguous() is mask, mask.dim()) == ((2, 1, 4, 4), True, 4)
    with torch._C.DisableTorchFunctionSubclass():
        assert mask.untyped_storage().nbytes() == 1, "no queries × keys tensor"
    for compute in (lambda: mask + 1, lambda: mask[..., :2], lambda: torch.where(mask, 1, 0)):
        with pytest.raises(ModelError, match="computes with its attention mask"):
            compute()
