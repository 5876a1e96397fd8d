"""A graph of nodes and edges is held to its own model before a number is given.

Mutation seen to fail: no run at the start.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import headwater as hw
from headwater.analyses._streams.component_graph import Wiring
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox", "apertus", "cohere2", "qwen3"])
def test_families_whose_edges_are_known(name: str) -> None:
    hf = zoo.build(name)
    for key, weight in hf.named_parameters():
        if "norm" in key or "ln_" in key:
            weight.data += 0.5 * torch.rand(weight.shape)
    Wiring(hw.load(hf))


def added(hf: Any) -> None:
    """Something else that writes into the stream of a block."""
    hf.model.layers[1].register_forward_hook(lambda module, args, output: output + output.roll(1, -1))


def test_what_the_graph_does_not_know_is_refused() -> None:
    hf = zoo.build("llama")
    added(hf)
    model = hw.load(hf)
    with pytest.raises(AnalysisError, match="edges are not known"):
        Wiring(model)


class Mixed(nn.Module):
    """A norm and a shift of its features: no norm whose gain could stand in front of a projection."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + 0.3 * self.norm(x).roll(1, -1)


def test_what_the_attention_reads_must_be_known() -> None:
    hf = zoo.build("llama")
    hf.model.layers[1].input_layernorm = Mixed(hf.model.layers[1].input_layernorm)
    model = hw.load(hf)
    with pytest.raises(AnalysisError, match=r"do not give its logits when every edge is kept|is not known"):
        Wiring(model)


def test_a_norm_over_the_whole_projection_names_the_way_out() -> None:
    """OLMo 2 normalises all keys together, so that a query head can not be given keys of its own."""
    model = hw.load(zoo.build("olmo2"))
    with pytest.raises(AnalysisError, match='give key_values="kv"'):
        Wiring(model)
    Wiring(model, "kv")


def test_edges_of_a_renamed_norm_are_the_effects_of_the_edges() -> None:
    """One edge of Apertus that is cut in the graph moves the logits as the same cut by hand does."""
    hf = zoo.build("apertus")
    for key, weight in hf.named_parameters():
        if "norm" in key:
            weight.data.uniform_(0.5, 2.0)
    model, ids = hw.load(hf), torch.arange(3, 12)[None]
    wiring = Wiring(model)
    group = next(g for g in wiring.groups if (g.layer, g.kind) == (1, "q"))
    sender = wiring.number["0.2"]

    def read(at: Any, stream: torch.Tensor, sent: list[torch.Tensor]) -> torch.Tensor | None:
        if at is not group:
            return None
        streams = stream[:, None].repeat(1, len(group.names), 1, 1)
        streams[:, 0] -= sent[sender]
        return streams

    found, sent = wiring.run(ids, read)
    block = hf.model.layers[1]
    stream: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda module, args: stream.append(args[0]))]

    def queries(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        other = module.weight @ block.attention_layernorm(stream[-1] - sent[sender]).mT
        output = output.clone()
        output[..., : model.d_head] = other.mT[..., : model.d_head]
        return output

    hooks.append(block.self_attn.q_proj.register_forward_hook(queries))
    expected = model(ids)
    for hook in hooks:
        hook.remove()
    assert (expected - model(ids)).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
