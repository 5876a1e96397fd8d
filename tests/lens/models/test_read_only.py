"""Models that compute their attention by themselves: read from their own dense weights, never edited, always said.

Seen to fail: GPT-Neo's window left out of `visible`, rows of padding kept, a layer's weights kept alive after it was
read, edits let through without effect.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import transformers
from transformers import FNetConfig, FNetForMaskedLM

import headwater as hw
from headwater.kernels.maps import statistics as kernel
from headwater.lens.attention.function import NAME
from headwater.lens.errors import EditError, ModelError
from headwater.lens.loading import zoo
from headwater.lens.loading.zoo_shapes import HEADS, LAYERS
from headwater.lens.models import read_only

READ = ("gptj", "gpt_neo", "deberta")


@pytest.mark.parametrize("name", READ)
def test_statistics_are_those_of_the_weights_the_model_gives(name):
    reference = zoo.build(name)
    model = hw.load(copy.deepcopy(reference))
    ids = zoo.inputs(name)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    with torch.no_grad():
        out = reference(input_ids=ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(model(ids, mask)[mask.bool()], out.logits[mask.bool()], atol=1e-5, rtol=1e-4)
    record = model.record(ids, mask, statistics=kernel.NAMES, groups={"front": [0, 1]})
    assert "read-only" in record.provenance["attention"]
    nothing = ~mask.bool()[:, None].expand(-1, HEADS, -1)
    for layer, weights in enumerate(out.attentions):
        weights = weights.double() * mask[:, None, :, None]
        distance = (torch.arange(11)[:, None] - torch.arange(11)).abs()
        expected = {
            "entropy": torch.special.entr(weights).sum(-1).masked_fill(nothing, torch.nan),
            "distance": (weights * distance).sum(-1).masked_fill(nothing, torch.nan),
            "received": weights.sum(-2),
            "visible": (weights > 0).sum(-2).double(),
        }
        for statistic, values in expected.items():
            found = torch.from_numpy(record.statistic(statistic).values)[:, layer].double()
            torch.testing.assert_close(found, values, atol=5e-5, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(record.pattern(layer).double(), weights, atol=1e-6, rtol=1e-5)
        gathered = record.map(layer).T @ torch.ones(11, 1)
        torch.testing.assert_close(gathered[..., 0].double(), weights.sum(-2), atol=1e-5, rtol=1e-4)


def test_one_layer_is_alive_at_a_time_and_the_model_is_left_as_it_was(monkeypatch):
    model = hw.load(zoo.build("gptj"))
    alive: list[weakref.ref] = []
    honest = read_only.as_map

    def watched(weights, *rest):
        assert [ref() for ref in alive if ref() is not None] == []
        alive.append(weakref.ref(weights))
        return honest(weights, *rest)

    monkeypatch.setattr(read_only, "as_map", watched)
    model.record(zoo.inputs("gptj")["input_ids"], keep=())
    assert len(alive) == LAYERS
    assert not any(module._forward_hooks for module in model.hf.modules())


@pytest.mark.parametrize("name", ["gptj", "deberta"])
def test_edits_gates_and_head_outputs_are_refused_by_name(name):
    model = hw.load(zoo.build(name))
    refusal = f"{type(model.hf).__name__} can not be edited: its own code computes its attention, so it is read-only"
    for change in (lambda: model.edit(hw.Temperature(2.0)), lambda: model.gated(torch.ones(1, 2, 4))):
        with pytest.raises(EditError, match=refusal):
            change()
    with pytest.raises(EditError, match="give no head outputs"):
        model.head_outputs([[5, 6]])


def test_weights_that_are_no_softmax_are_refused_while_running(monkeypatch):
    """As of a model that goes over to an approximation when the text is long."""
    model = hw.load(zoo.build("gptj"))
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, **_: torch.sigmoid(x))
    with pytest.raises(ModelError, match="no softmax over the real tokens"):
        model.record([[5, 6, 7]])


SMALL = {
    "vocab_size": 97,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
PICTURE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "image_size": 12,
    "patch_size": 4,
}


def made(name, **config):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind._from_config(kind.config_class(**config), attn_implementation="eager").eval()


def text(*lengths):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(1)), mask


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("OpenAIGPTLMHeadModel", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("MvpModel", SEQ2SEQ | {"vocab_size": 97}),
        ("FSMTModel", SEQ2SEQ | {"langs": ["en", "de"], "src_vocab_size": 97, "tgt_vocab_size": 97}),
        ("LEDModel", SEQ2SEQ | {"vocab_size": 97, "attention_window": 4}),
        ("Data2VecVisionModel", PICTURE),
        ("BlipModel", {"text_config": SMALL | {"encoder_hidden_size": 32}, "vision_config": PICTURE}),
    ],
)  # fmt: skip
def test_weights_of_decoders_encoders_images_and_towers_are_read_where_they_are_given(name, config):
    reference = made(name, **config)
    model = hw.load(copy.deepcopy(reference))
    given = {"pixel_values": torch.randn(2, 3, 12, 12)} if "image_size" in str(config) else {}
    if model.vocab:
        given |= dict(zip(("input_ids", "attention_mask"), text(9, 6), strict=True))
    if model.is_encoder_decoder:
        given |= dict(zip(("decoder_input_ids", "decoder_attention_mask"), text(5, 7), strict=True))
    with torch.no_grad():
        out = reference(**given, output_attentions=True, **({"use_cache": False} if model.vocab else {}))
    towers = {"text": out, "vision": out} | {
        n: out[f"{n}_model_output"] for n in ("text", "vision") if f"{n}_model_output" in out
    }
    record = model.record(**given)
    parts = {next(iter(model.parts)): record, **record.parts}
    assert set(parts) == set(model.parts)
    for part, of_part in parts.items():
        field = f"{part}_attentions" if model.is_encoder_decoder else "attentions"
        for layer, expected in enumerate((out if model.is_encoder_decoder else towers[part])[field]):
            expected = expected * of_part.valid[:, None, :, None]
            torch.testing.assert_close(of_part.pattern(layer), expected, atol=1e-6, rtol=1e-5)
    assert ("encoder_attentions" in model.unread) == (name == "LEDModel")


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("LongformerModel", SMALL | {"attention_window": 4}, r"\[2, 4, 24, 5\], where \[2, heads, 24, 24\]"),
        (
            "HieraModel",
            {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2],
             "num_query_pool": 1},
            r"the shape is \[2, 1, .*\], where \[batch, heads, queries, keys\]",
        ),
    ],
)  # fmt: skip
def test_weights_that_are_no_map_are_refused_with_the_reason(name, config, reason):
    model = made(name, **config)
    with pytest.raises(
        ModelError, match=f"{name} computes its attention by itself .*of the weights it gives .*{reason}"
    ):
        hw.load(model)


def test_models_that_give_no_weights_are_refused_by_name():
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    with pytest.raises(ModelError, match=r"FNetForMaskedLM .*can not be read"):
        hw.load(FNetForMaskedLM(FNetConfig(**shape)))


def test_layers_that_share_a_module_and_folded_windows_are_refused():
    from transformers import AlbertConfig, AlbertModel, Swinv2Config, Swinv2Model

    shape = {"vocab_size": 50, "embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2}
    shared = AlbertModel(AlbertConfig(**shape, num_hidden_layers=2, intermediate_size=16))
    before = shared.config._attn_implementation
    with pytest.raises(ModelError, match="serves several layers"):
        hw.load(shared)
    assert shared.config._attn_implementation == before != NAME
    windows = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1],
        "num_heads": [2],
        "window_size": 3,  # which does not fill the grid
    }
    with pytest.raises(ModelError, match="folds its windows into the batch"):
        hw.load(Swinv2Model(Swinv2Config(**windows)))
