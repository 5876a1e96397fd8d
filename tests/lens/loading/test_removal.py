"""Heads removed from the weights: the smaller model gives what gates of zero give.

What can be saved, and what is refused (`smaller_config.py`), is tried on folders that are opened again.

Mutations seen to fail: output rows of the wrong heads kept; a silent layer's output weights left in; the configuration
left as it was; what can not be saved written all the same; one head more taken for removable than a group allows.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import HeadError, ModelError
from headwater.lens.loading import zoo
from headwater.lens.loading.removal import removable, remove_heads


def gated(model: hw.HookedModel, heads: list[str], ids: torch.Tensor) -> torch.Tensor:
    gates = torch.ones(1, model.n_layers, model.n_heads)
    for name in heads:
        layer, head = map(int, name.split("."))
        gates[0, layer, head] = 0
    with model.gated(gates):
        return model(ids)


CHOICES = {
    "gpt2": ["0.0", "0.3", "1.0", "1.1", "1.2", "1.3", "2.2"],
    "bert": ["0.1", "1.0", "1.2", "1.3"],
    "llama": ["0.0", "0.1", "1.1", "1.3", "2.0", "2.1", "2.2", "2.3"],
    "mistral": ["0.2", "0.3"],
    "gemma2": ["1.0", "1.1", "2.0", "2.2"],
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_it_gives_what_gates_of_zero_give(name: str) -> None:
    plain = tiny_models.tiny(name)
    before = sum(p.numel() for p in plain.parameters())
    model = hw.load(plain)
    ids = torch.randint(3, tiny_models.VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
    smaller = remove_heads(model, CHOICES[name])
    with torch.no_grad():
        found = smaller(input_ids=ids).logits
    torch.testing.assert_close(found, gated(model, CHOICES[name], ids), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in smaller.parameters()) < before
    assert sum(p.numel() for p in model.hf.parameters()) == before
    if name != "bert":
        with model.edit(hw.ScaleHeads(dict.fromkeys(CHOICES[name], 0.0))):
            wanted = model.generate(ids, max_new_tokens=5)
        text = smaller.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
        assert torch.equal(text[:, : wanted.shape[1]], wanted)


def test_sizes() -> None:
    """Two of four heads of 8: half of the projections; of two key–value heads, one."""
    model = hw.load(tiny_models.tiny("llama"))
    attention = remove_heads(model, ["1.0", "1.1"]).model.layers[1].self_attn
    assert attention.q_proj.weight.shape == (16, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (8, 32)
    assert attention.o_proj.weight.shape == (32, 16)
    assert attention.num_key_value_groups == 2
    fused = remove_heads(hw.load(tiny_models.tiny("gpt2")), ["0.1"]).transformer.h[0].attn
    assert fused.c_attn.weight.shape == (32, 72)
    assert fused.c_attn.bias.shape == (72,)
    assert fused.c_proj.weight.shape == (24, 32)


EVERY = [f"{layer}.{head}" for layer in range(3) for head in (0, 1)]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2", "phi3"])
@pytest.mark.parametrize("heads", [EVERY, [name.replace(".1", ".2") for name in EVERY]])
def test_what_remains_is_saved_and_opens_again(tmp_path: Path, name: str, heads: list[str]) -> None:
    """A key–value head with its queries out of every layer, or a query head out of every group."""
    plain = tiny_models.tiny(name) if name in tiny_models.ALL else zoo.build(name)
    model = hw.load(plain)
    if model.n_kv_heads == model.n_heads:
        heads = EVERY
    heads = [head for head in heads if int(head.split(".")[0]) < model.n_layers]
    smaller = remove_heads(model, heads)
    smaller.save_pretrained(tmp_path)
    again = hw.load(tmp_path)
    assert (again.n_heads, again.d_head) == (2, model.d_head)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(ids), gated(model, heads, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "heads", "reason"),
    [
        ("llama", ["0.0", "0.1", "0.2", "0.3"], "its layers keep 1 and 4 heads"),
        ("llama", ["1.0", "1.1"], "its layers keep 2 and 4 heads"),
        ("gpt2", EVERY, "its configuration has no number for what transformer.h"),
        ("bert", EVERY, "its configuration has no number for what bert.encoder"),
    ],
)
def test_what_no_configuration_says_is_refused_before_it_is_written(
    tmp_path: Path, name, heads, reason
) -> None:
    smaller = remove_heads(hw.load(tiny_models.tiny(name)), heads)
    with pytest.raises(ModelError, match=reason):
        smaller.save_pretrained(tmp_path / "folder")
    assert not [*tmp_path.iterdir()]
    model = hw.load(smaller)
    assert model(torch.tensor([[3, 4, 5]])).isfinite().all()
    if len({model.shape(layer).heads for layer in model.layers}) > 1:
        with pytest.raises(ModelError, match="and 4 query heads"):
            model.record(torch.tensor([[3, 4, 5]]))


def test_the_largest_part_that_can_be_cut() -> None:
    model = hw.load(tiny_models.tiny("llama"))
    every = [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    drawn = random.Random(3)
    for _ in range(60):
        heads = drawn.sample(every, drawn.randrange(1, 12))
        cut = [str(head) for head in removable(model, heads)]
        assert set(cut) <= set(heads)
        remove_heads(model, cut) if cut else None
        for layer in range(3):
            gone = [[f"{layer}.{head}" in heads for head in group] for group in ((0, 1), (2, 3))]
            count = sum(head.startswith(f"{layer}.") for head in cut)
            # whole groups go; of two that are cut in part one head each
            least = min((sum(group) for group in gone if not all(group)), default=0)
            assert count == sum(2 if all(group) else least for group in gone)


def test_refusals() -> None:
    model = hw.load(tiny_models.tiny("llama"))
    with pytest.raises(ModelError, match="would keep 1, 2 query heads of its 2 key–value heads"):
        remove_heads(model, ["0.0"])
    with pytest.raises(HeadError, match=r"9\.0"):
        remove_heads(model, ["9.0"])
    with pytest.raises(ModelError, match="GptOssForCausalLM"):
        remove_heads(hw.load(tiny_models.tiny("gptoss")), ["0.0", "0.1"])
