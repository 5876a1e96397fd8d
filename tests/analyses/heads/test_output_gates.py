"""Statistics of output gates against hooks on the eager model."""

from __future__ import annotations

import gated_models
import pytest
import torch

import headwater as hw
from headwater.lens.errors import AnalysisError

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", gated_models.CONFIGS)
def test_statistics_of_the_gate(name: str) -> None:
    hf = gated_models.gated(name)
    found = hw.analyses.output_gates(hw.load(gated_models.gated(name)), IDS, below=0.3)
    for layer in (0, 1):
        dense = gated_models.dense(hf, name, IDS, layer)
        each = (dense["gate"][:, :, :, None] * dense["value"][:, :, None]).norm(dim=-1)
        expected = {
            "gate_mean": dense["gate"].mean(-1), "shut": (dense["gate"] < 0.3).double().mean(-1),
            "effective_mass": (dense["weights"] * each).sum(-1),
            "ungated_mass": (dense["weights"] * dense["value"].norm(dim=-1)[:, :, None]).sum(-1),
        }  # fmt: skip
        for what, values in expected.items():
            mine = torch.as_tensor(found[what].sel(layer=layer).values)
            torch.testing.assert_close(mine, values, atol=1e-5, rtol=1e-4)


def test_texts_of_unequal_length_and_models_without_a_gate() -> None:
    model = hw.load(gated_models.gated("Qwen3_5"))
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    found = hw.analyses.output_gates(model, model.to_tokens(IDS, mask))
    alone = hw.analyses.output_gates(model, IDS[1:, :6])
    assert found.gate_mean.isel(batch=1, query=slice(6, None)).isnull().all()
    torch.testing.assert_close(
        torch.as_tensor(found["gate_mean"].values[1, :, :, :6]), torch.as_tensor(alone["gate_mean"].values[0])
    )
    with pytest.raises(AnalysisError, match="no layer of tasks-4l has an output gate"):
        hw.analyses.output_gates(hw.load("tasks-4l"), "Mary gave John a drink")
