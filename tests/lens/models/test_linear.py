"""The matrix of a linear module is what the module gives: adapters, few bits, hooks and parametrizations count."""

from __future__ import annotations

import adapted
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from headwater.lens.errors import ModelError
from headwater.lens.models.linear import KEPT, _known, linear, outputs, refuse_without_gradient, table

LORA: dict[str, dict] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def projection(model, name: str = "q_proj") -> nn.Module:
    return model.get_base_model().model.layers[1].self_attn.get_submodule(name)


def test_plain_modules_give_their_own_weight() -> None:
    torch.manual_seed(0)
    for module in (nn.Linear(5, 7), nn.Linear(5, 7, bias=False), Conv1D(7, 5), nn.Linear(5, 7).bfloat16()):
        found = linear(module)
        own = module.weight if isinstance(module, Conv1D) else module.weight.T
        assert found.stored
        assert torch.equal(found.weight, own)
        assert found.weight.data_ptr() == module.weight.data_ptr()
        assert found.bias is module.bias
        assert outputs(module) == 7


@pytest.mark.parametrize("kind", list(LORA))
def test_adapters_give_the_merged_weight(kind: str) -> None:
    pytest.importorskip("peft")
    model = adapted.adapted(["q_proj", "k_proj"], **LORA[kind])
    for name in ("q_proj", "k_proj"):
        found = linear(projection(model, name))
        expected = adapted.merged(model).model.layers[1].self_attn.get_submodule(name).weight.T
        assert not found.stored
        torch.testing.assert_close(found.weight, expected, rtol=1e-5, atol=1e-6)
    assert linear(projection(model, "v_proj")).stored


def test_a_changed_adapter_changes_the_matrix() -> None:
    """What is kept of one call is not given for other weights, another adapter, or none."""
    pytest.importorskip("peft")
    model = adapted.adapted(["q_proj"])
    module = projection(model)
    first = linear(module).weight
    assert linear(module).weight is first
    with torch.no_grad():
        module.lora_B["default"].weight[0, 0] += 1e-4
    second = linear(module).weight
    assert 0 < (second - first).abs().max() < 1e-3
    module.scaling["default"] *= 2  # no tensor changes
    third = linear(module).weight
    base = module.base_layer.weight.T
    torch.testing.assert_close(third - base, 2 * (second - base), rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(linear(module).weight, base)
    assert torch.equal(linear(module).weight, third)


def test_a_small_adapter_in_half_precision_is_seen() -> None:
    """In bfloat16 an adapter may be smaller than what sums in another order differ by."""
    pytest.importorskip("peft")
    model = adapted.adapted(["q_proj"])
    module = projection(model)
    with torch.no_grad():
        module.lora_B["default"].weight.mul_(0.02)
    expected = adapted.merged(model).model.layers[1].self_attn.q_proj.weight.T
    found = linear(projection(model.bfloat16()))
    assert not found.stored
    base = module.base_layer.weight.T.float()
    assert (found.weight - expected).norm() < 0.3 * (expected - base).norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_give_the_dequantised_weight(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    small, twin = adapted.few_bits(bits)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        found = linear(small.model.layers[1].get_submodule(name)).weight
        expected = twin.model.layers[1].get_submodule(name).weight.T
        # outputs have the rounding of float16, and of bfloat16 under 4 bits
        error = {8: 1e-3, 4: 8e-3}[bits]
        torch.testing.assert_close(
            found, expected, rtol=error, atol=error * float(expected.detach().abs().max())
        )
    assert linear(small.lm_head).stored


def test_hooks_and_parametrizations_count() -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 7)
    expected = 3 * module.weight.T
    handle = module.register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(linear(module).weight, expected)
    torch.testing.assert_close(linear(module).bias, 3 * module.bias)
    handle.remove()
    normed = nn.utils.parametrizations.weight_norm(module)
    normed.parametrizations.weight.original0.data *= 2
    torch.testing.assert_close(linear(normed).weight, 2 * expected / 3)


class Bent(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * super().forward(x).relu()


def test_what_is_not_linear_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"layers\.1\.q_proj \(.*Bent\) is not linear"):
        linear(Bent(32, 32), "layers.1.q_proj")
    noisy = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5)).train()
    noisy.in_features = 32
    with pytest.raises(ModelError, match="Sequential is not linear"):
        linear(noisy)


def test_few_matrices_are_kept() -> None:
    modules = [nn.Linear(4, 4) for _ in range(KEPT + 5)]
    for module in modules:
        module.register_forward_hook(lambda module, args, output: 2 * output)
        linear(module)
    assert len(_known) <= KEPT
    assert modules[-1] in _known


def test_tables_have_their_scale_and_their_adapters() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    scaled = Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=3.0)
    torch.testing.assert_close(table(scaled, 9), 3 * scaled.weight.detach())
    pytest.importorskip("peft")
    model = adapted.adapted(["embed_tokens"])
    expected = adapted.merged(model).get_input_embeddings().weight
    found = table(model.get_base_model().get_input_embeddings(), 97)
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.filterwarnings("ignore")
def test_a_module_without_gradient_is_refused() -> None:
    """torch's dynamic quantisation gives outputs that require gradients and hands none on."""
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    with pytest.raises(ModelError, match="gives no gradient"):
        refuse_without_gradient(quantised.modules())
    refuse_without_gradient([nn.Linear(4, 4)])
    pytest.importorskip("bitsandbytes")
    refuse_without_gradient(adapted.few_bits(8)[0].modules())


def test_a_module_that_reads_more_than_rows_is_refused_by_name() -> None:
    class Earlier(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (0, 0, 1, 0))[:, : x.shape[1]]) + super().forward(x)

    with pytest.raises(ModelError, match=r"Earlier does not take rows of 5 numbers \(RuntimeError"):
        linear(Earlier(5, 7))
