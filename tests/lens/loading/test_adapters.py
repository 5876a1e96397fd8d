"""A PeftModel, its base, and quantised models are opened as they are, and what is read is what their modules do."""

from __future__ import annotations

from typing import Any

import adapted
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.lens.errors import ModelError

IDS = torch.arange(3, 15)[None]
WEIGHTS = ("W_Q", "W_K", "W_V", "W_O")
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


def same_weights(found: hw.HookedModel, expected: hw.HookedModel, error: float = 1e-5) -> None:
    for layer in expected.layers:
        for fold in (False, True):
            ours, theirs = (model.weights(layer, fold=fold) for model in (found, expected))
            for name in WEIGHTS:
                one, other = getattr(ours, name), getattr(theirs, name)
                torch.testing.assert_close(one, other, rtol=error, atol=error * float(other.abs().max()))


@pytest.mark.parametrize("given", ["model", "base"])
def test_unmerged_adapters_are_the_merged_model(given: str) -> None:
    pytest.importorskip("peft")
    model = adapted.adapted(EVERYTHING)
    expected = hw.load(adapted.merged(model))
    base = adapted.plain()
    found = hw.load(model if given == "model" else model.get_base_model())
    assert (found(IDS) - base(IDS).logits).abs().max() > 0.1  # the adapters act
    torch.testing.assert_close(found(IDS), expected(IDS), rtol=1e-4, atol=1e-4)
    same_weights(found, expected)
    torch.testing.assert_close(
        found.record(IDS).map(1).dense(), expected.record(IDS).map(1).dense(), rtol=1e-4, atol=1e-5
    )
    with found.edit(hw.Temperature(2.0)), expected.edit(hw.Temperature(2.0)):
        torch.testing.assert_close(found(IDS), expected(IDS), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="merge the adapters"):
        hw.remove_heads(found, ["0.0", "0.1"])


@pytest.mark.parametrize("kind", ["IA3", "several", "saved modules"])
def test_other_adapters_are_what_they_do(kind: str) -> None:
    peft = pytest.importorskip("peft")
    if kind == "IA3":
        config = peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
        with adapted.quietly():
            model = peft.get_peft_model(adapted.plain(), config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "ia3" in name:
                    weight.uniform_(0.5, 2.0)
    elif kind == "several":
        model = adapted.adapted(["q_proj"])
        model.add_adapter(
            "second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "second"])
        model.eval()
    else:
        model = adapted.adapted(["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.3)
    expected = hw.load(adapted.merged(model))
    found = hw.load(model)
    torch.testing.assert_close(found(IDS), expected(IDS), rtol=1e-4, atol=1e-4)
    same_weights(found, expected)


def test_a_disabled_adapter_is_not_read() -> None:
    pytest.importorskip("peft")
    model = adapted.adapted(["q_proj"])
    found, base = hw.load(model), hw.load(adapted.plain())
    with model.disable_adapter():
        same_weights(found, base)
    assert (found.weights(0).W_Q - base.weights(0).W_Q).abs().max() > 0.1


def test_adapters_are_in_the_revision() -> None:
    pytest.importorskip("peft")

    def revision(change: Any) -> str:
        model = adapted.adapted(["q_proj"])
        change(model)
        return hw.load(model).revision

    def scaled(model: Any) -> None:
        model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] = 0.5

    def moved(model: Any) -> None:
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] += 1

    plain = revision(lambda model: None)
    others = [
        revision(scaled),
        revision(moved),
        revision(lambda model: model.base_model.disable_adapter_layers()),
    ]
    assert plain == revision(lambda model: None)
    assert len({plain, *others}) == 4
    assert plain != hw.load(adapted.plain()).revision


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT"])
def test_adapters_beside_the_text_are_refused_by_name(kind: str) -> None:
    peft = pytest.importorskip("peft")
    configs = {
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(
            adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"
        ),
    }
    with adapted.quietly():
        model = peft.get_peft_model(adapted.plain(), configs[kind]())
    with pytest.raises(ModelError, match=kind if kind != "ADAPTION_PROMPT" else "adds keys of its own"):
        hw.load(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_are_the_dequantised_model(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    small, twin = adapted.few_bits(bits)
    found, expected = hw.load(small), hw.load(twin)
    error = {8: 1e-3, 4: 8e-3}[bits]
    same_weights(found, expected, error)
    record, other = found.record(IDS), expected.record(IDS)
    assert (record.map(0).dense() - other.map(0).dense()).abs().max() < 0.05
    before = found(IDS)
    with found.edit(hw.AblateHeads(["1.0"])):
        assert (found(IDS) - before).abs().max() > 1e-2
    ranks, others = (hw.analyses.circuit_rank(model).stable_rank for model in (found, expected))
    torch.testing.assert_close(torch.tensor(ranks.values), torch.tensor(others.values), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_torchs_dynamic_quantisation_is_read_and_gives_no_gradients() -> None:
    small = torch.ao.quantization.quantize_dynamic(adapted.plain(), {nn.Linear}, dtype=torch.qint8)
    twin = adapted.plain()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = small.get_submodule(name).weight().dequantize()
    found, expected = hw.load(small), hw.load(twin)
    same_weights(found, expected)
    assert (found.record(IDS).map(0).dense() - expected.record(IDS).map(0).dense()).abs().max() < 0.1
    with pytest.raises(ModelError, match="gives no gradient"):
        found(IDS, grad=True)


def test_4_bits_are_not_unpacked_by_reading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes unpacks 4 bit weights for `state_dict` on a CPU, and the model gives other numbers afterwards."""
    pytest.importorskip("bitsandbytes")
    small, _ = adapted.few_bits(4)
    with torch.no_grad():
        before = small(IDS).logits
    monkeypatch.setattr(nn.Module, "state_dict", lambda *_, **__: pytest.fail("state_dict is asked"))
    found = hw.load(small)
    assert torch.equal(found(IDS), before)
    revision = found.record(IDS).provenance["revision"]
    assert torch.equal(found(IDS), before)
    assert found.revision == revision
    with torch.no_grad():
        small.model.layers[1].mlp.up_proj.weight.quant_state.absmax.mul_(2)
    assert found.revision != revision


def test_the_adapter_that_acts_is_in_the_revision() -> None:
    peft = pytest.importorskip("peft")
    model = adapted.adapted(["q_proj"])
    with adapted.quietly():
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    found = hw.load(model)
    one = found.revision
    model.set_adapter("two")
    assert found.revision != one
    with model.disable_adapter():
        assert found.revision not in (one, hw.load(adapted.plain()).revision)
    model.set_adapter("default")
    assert found.revision == one
