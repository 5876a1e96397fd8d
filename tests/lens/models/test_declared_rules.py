"""A folder's config may declare a normaliser and learned keys and values; what it declares wrongly is refused.

Mutation seen to fail: the learned value of layer 0 put on every layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

import headwater as hw
from headwater.lens.attention.own_rule import own_rule
from headwater.lens.errors import ModelError

LEARNED = {
    f"model.layers.{layer}.self_attn.bias_{part}": torch.randn(4, 8)
    for layer in range(3) for part in ("key", "value")
}  # fmt: skip


def folder(path: Path, declared: object, learned: dict[str, torch.Tensor] | None = None) -> Path:
    tiny_models.tiny("llama").save_pretrained(path)
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"headwater_attention": declared}))
    if learned is not None:
        save_file(learned, path / "attention.safetensors")
    return path


def test_a_declared_normaliser_is_the_models(tmp_path):
    declared = hw.load(folder(tmp_path / "m", {"normaliser": {"name": "sigmoid", "bias": -2.0}}))
    plain, (ids, _) = hw.load(tiny_models.tiny("llama")), tiny_models.batch()
    with plain.edit(hw.Normaliser("sigmoid", bias=-2.0)):
        torch.testing.assert_close(declared(ids), plain(ids))
    assert declared.record(ids).provenance["attention"] == "sigmoid"


def test_learned_keys_and_values_are_put_on_their_layers(tmp_path):
    model = hw.load(folder(tmp_path / "m", {"kv_bias": True}, LEARNED))
    for layer in model.layers:
        rule = own_rule(model.attention_module(layer))
        assert rule.key.equal(LEARNED[f"model.layers.{layer}.self_attn.bias_key"])
        assert rule.value.equal(LEARNED[f"model.layers.{layer}.self_attn.bias_value"])
    record = model.record(tiny_models.batch()[0])
    assert record.provenance["attention"] == "softmax, a learned key and value per head"
    assert (record.statistic("row_mass") < 1).all()


@pytest.mark.parametrize(
    ("declared", "learned", "message"),
    [
        ([], {}, "takes normaliser and kv_bias"),
        ({"softmax": 1}, {}, "takes normaliser and kv_bias"),
        ({"normaliser": 3}, {}, "a name or an object with its name; got 3"),
        ({"normaliser": "sparsemax"}, {}, "unknown normaliser 'sparsemax'"),
        ({"normaliser": "sigmoid", "kv_bias": True}, LEARNED, "goes with a softmax"),
        ({"kv_bias": True}, None, "declares kv_bias but has no attention.safetensors"),
        ({"kv_bias": True}, {"x": torch.zeros(1)}, "bias_key"),
        ({"kv_bias": True}, LEARNED | dict.fromkeys(LEARNED, torch.zeros(4, 7)), r"\[4, 8\]; got \[4, 7\]"),
    ],
)
def test_what_is_declared_wrongly_is_refused(declared, learned, message, tmp_path):
    if learned is not None:
        learned = {name: tensor.clone() for name, tensor in learned.items()}
    path = folder(tmp_path / "m", declared, learned)
    with pytest.raises(ModelError, match=message):
        hw.load(path)
