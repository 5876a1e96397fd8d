"""Models that compute their attention by themselves: read from their own dense weights, never edited, always said.

Seen to fail: GPT-Neo's window left out of `visible`, rows of padding kept, a layer's weights kept alive after it was
read, edits let through without effect.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from transformers import FNetConfig, FNetForMaskedLM

import headwater as hw
from headwater.kernels.maps import statistics as kernel
from headwater.lens.attention.function import NAME
from headwater.lens.errors import EditError, ModelError
from headwater.lens.loading import zoo
from headwater.lens.models import read_only

READ = ("bloom", "falcon", "gptj", "gpt_neo", "mpt", "deberta")


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
    nothing = ~mask.bool()[:, None].expand(-1, zoo.HEADS, -1)
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
    assert len(alive) == zoo.LAYERS
    assert not any(module._forward_hooks for module in model.hf.modules())


@pytest.mark.parametrize("name", ["bloom", "deberta"])
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
    model = hw.load(zoo.build("bloom"))
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, **_: torch.sigmoid(x))
    with pytest.raises(ModelError, match="no softmax over the real tokens"):
        model.record([[5, 6, 7]])


def test_models_that_give_no_weights_are_refused_by_name():
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    with pytest.raises(ModelError, match=r"FNetForMaskedLM .*can not be read"):
        hw.load(FNetForMaskedLM(FNetConfig(**shape)))


def test_layers_that_share_a_module_and_folded_windows_are_refused():
    from transformers import AlbertConfig, AlbertModel, SwinConfig, SwinModel

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
        "window_size": 4,
    }
    with pytest.raises(ModelError, match="folds its windows into the batch"):
        hw.load(SwinModel(SwinConfig(**windows)))
