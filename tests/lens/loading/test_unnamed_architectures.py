"""Architectures that no table names: positions behind those of padding, images placed in two dimensions, chunks.

Seen to fail: RoBERTa's positions counted from 0, Qwen2-VL's positions counted
along the text where the row is padded or the last token of a generation is read, chunks kept as a function (no file
takes it), a value as wide as a query in the estimate.
"""

from __future__ import annotations

import copy

import pytest
import small_families
import torch

import headwater as hw
from headwater.lens.errors import EditError, PromptError, RecordError
from headwater.lens.loading import zoo

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
IMAGE = 90


def made(name, **config):
    model = small_families.made(name, config)
    return model, hw.load(copy.deepcopy(model))


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "MPNetForMaskedLM", "ElectraForMaskedLM"])
def test_padding_on_the_left_changes_nothing_whatever_the_first_position_is_called(name):
    dense, model = made(name, **SHAPE)
    ids = torch.randint(5, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    expected = dense(input_ids=ids).logits
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    torch.testing.assert_close(model(padded, mask)[:, 4:], expected, atol=2e-6, rtol=1e-4)
    first = 0 if "Electra" in name else 2
    assert model.context == 64 - first
    model(torch.full((1, 64 - first), 7))
    with pytest.raises(PromptError, match=f"the model's context is {64 - first}"):
        model(torch.full((1, 65 - first), 7))


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = SHAPE | {"num_key_value_heads": 2, "pad_token_id": 0, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    return made(
        "Qwen2VLForConditionalGeneration", text_config=text, vision_config=vision, image_token_id=IMAGE,
        vision_start_token_id=91, vision_end_token_id=92, video_token_id=93,
    )  # fmt: skip


def test_images_that_are_placed_by_row_and_column():
    dense, model = qwen2_vl()
    seeded = torch.Generator().manual_seed(2)
    words = torch.randint(5, 80, (1, 8), generator=seeded)
    image = torch.full((1, 16), IMAGE)
    ids = torch.cat([words[:, :3], torch.tensor([[91]]), image, torch.tensor([[92]]), words[:, 3:]], 1)
    pixels = torch.randn(64, 3 * 2 * 14 * 14, generator=seeded)

    def more(ids):
        kinds = (ids == IMAGE).long()
        return {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 8, 8]]),
            "mm_token_type_ids": kinds,
        }

    with torch.no_grad():
        expected = dense(input_ids=ids, **more(ids)).logits
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    torch.testing.assert_close(model(padded, mask, **more(padded))[:, 3:], expected, atol=5e-6, rtol=1e-4)
    output, record = model.generate(ids, 4, record=True, eos_token_id=-1, **more(ids))
    whole = model.record(output, **more(output))
    for layer in whole.layers:
        torch.testing.assert_close(record.pattern(layer), whole.pattern(layer), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_chunks_are_written_down_also_as_a_text_grows(tmp_path, padded):
    model = hw.load(zoo.build("llama4"))
    ids = zoo.inputs("llama4", lengths=(14, 14))["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, : 4 * padded] = 0
    record = model.record(ids, mask)
    assert record.map(0).rule.mask.extra is None
    opened = hw.Record.open(record.save(tmp_path / "chunks.safetensors"), verify=True)
    assert all(opened.pattern(layer).equal(record.pattern(layer)) for layer in record.layers)
    with model.edit(hw.Redistribute([0], 0.3)):
        output, grown = model.generate(ids, 7, mask, record=True, eos_token_id=-1)
        whole = model.record(output, torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], 1))
    opened = hw.Record.open(grown.save(tmp_path / "grown.safetensors"))
    for layer in whole.layers:
        torch.testing.assert_close(opened.pattern(layer), whole.pattern(layer), atol=2e-6, rtol=1e-4)


def test_the_estimate_knows_values_that_are_narrower_than_queries():
    model = hw.load(zoo.build("deepseek_v3"))
    ids = zoo.inputs("deepseek_v3", lengths=(40, 40))["input_ids"]
    expected = model.estimate(ids, statistics=(), keep=("qkv",)).parts["values"]
    kept = model.record(ids, statistics=(), keep=("qkv",)).values
    assert expected == sum(value.numel() * value.element_size() for value in kept.values())


def test_patterns_by_the_own_position_are_refused_in_cross_attention():
    model = hw.load(zoo.build("bart"))
    for pattern in ("identity", "previous", "matching", {"offset": 2}):
        with pytest.raises(EditError, match="InjectPattern has no meaning in cross-attention"):
            model.part("cross").edit(hw.InjectPattern(pattern))
    with model.part("cross").edit(hw.InjectPattern("uniform")):
        pass


def test_edits_by_token_are_refused_by_name_where_a_growing_map_is_kept():
    model = hw.load(zoo.build("llama"))
    ids = zoo.inputs("llama")["input_ids"]
    edit = hw.Knockout("all", f"token:#{int(ids[0, 2])}")
    with model.edit(edit):
        with pytest.raises(RecordError, match=r"^Knockout: an edit that goes by the tokens themselves"):
            model.generate(ids, 3, record=True)
        output, record = model.generate(ids, 3, record=True, keep=())
        whole = model.record(output, keep=())
    torch.testing.assert_close(
        record.statistics["entropy"], whole.statistics["entropy"], atol=2e-6, rtol=1e-4
    )
