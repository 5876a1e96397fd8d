"""Output gates are found in whatever form a model has them, and what is no gate is refused."""

from __future__ import annotations

import gated_models
import pytest
import tiny_models
import torch
import transformers

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.models.projections import projections
from headwater.lens.running.output_gates import gates_of_run

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", gated_models.CONFIGS)
def test_the_gate_is_that_of_the_formula(name):
    expected = [gated_models.dense(gated_models.gated(name), name, IDS, layer) for layer in (0, 1)]
    model = hw.load(gated_models.gated(name))
    for layer, (_, gate) in gates_of_run(model, IDS).items():
        assert gate is not None
        torch.testing.assert_close(gate.double(), expected[layer]["gate"], atol=1e-6, rtol=1e-5)
        assert float((gate - 0.5).abs().max()) > 0.1
        found = projections(model, layer)
        assert found.gate is not None
        query, _ = found.query.weights()
        assert query.shape == (32, 4, 8)


def test_without_a_gate_there_is_none():
    model = hw.load(tiny_models.tiny("llama"))
    assert all(gate is None for _, gate in gates_of_run(model, IDS % 50).values())


def test_a_norm_in_front_of_the_output_projection_is_no_gate():
    shape = {k: v for k, v in gated_models.SHAPE.items() if k not in ("layer_types", "head_dim")}
    torch.manual_seed(0)
    model = hw.load(transformers.BitNetForCausalLM(transformers.BitNetConfig(**shape)).eval())
    with pytest.raises(ModelError, match=r"layer 0 of BitNet.* otherwise than times a gate .* is not known"):
        gates_of_run(model, IDS)
