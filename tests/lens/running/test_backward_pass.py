"""What a model gives under backward rules is what it gives without.

Mutation seen to fail: the value of a norm computed anew from its formula.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hybrid_models import hybrid
from tiny_models import tiny

import headwater as hw
from headwater.lens.attention import backward_rules
from headwater.lens.errors import ModelError

IDS = torch.tensor([[5, 17, 30, 8, 22, 9], [40, 9, 3, 31, 7, 13]])


def flowing(model: hw.HookedModel, rule: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of one of them at the embeddings."""
    table = model.hf.get_input_embeddings()
    kept: list[torch.Tensor] = []

    def catch(*given: Any) -> torch.Tensor:
        kept.append(given[-1].detach().requires_grad_())
        return kept[0]

    handle = table.register_forward_hook(catch)
    try:
        with backward_rules.following(rule):
            logits = model(IDS, grad=True)
    finally:
        handle.remove()
    return logits.detach(), torch.autograd.grad(logits[:, -1, 5].sum(), kept[0])[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptoss", "bert"])
def test_what_the_model_gives_stays_bit_for_bit(name: str) -> None:
    model = hw.load(tiny(name))
    plain, slope = flowing(model, "gradient")
    for rule in backward_rules.RULES:
        logits, flow = flowing(model, rule)
        assert torch.equal(logits, plain)
        assert (flow - slope).abs().max() > 1e-3 * slope.abs().max()
    assert all(weight.grad is None for weight in model.hf.parameters())


def test_experts_and_their_router_conserve_relevance() -> None:
    torch.manual_seed(3)
    config = hf.MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    config._experts_implementation = "eager"
    model = hw.load(hf.MixtralForCausalLM(config).eval())
    ids = model.hf.get_input_embeddings()(IDS)
    logits, flow = flowing(model, "relp")
    total = (ids * flow).sum((1, 2))
    torch.testing.assert_close(total, logits[:, -1, 5], rtol=1e-4, atol=1e-6)


def test_layers_without_attention_have_no_rule() -> None:
    with pytest.raises(ModelError, match="no backward rule"):
        flowing(hw.load(hybrid("lfm2")), "relp")
