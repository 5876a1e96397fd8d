"""Products over layers are refused where something else moves information between positions, and taken where not."""

from __future__ import annotations

import pytest
import torch
from hybrid_models import built, hybrid

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

IDS = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
OF_RECORDS = ("rollout", "flow", "flow_graph")
OF_MODELS = ("relevance", "gradient_rollout", "value_zeroing", "alti", "globenc")


@pytest.mark.parametrize("name", ["jamba", "falcon_h1", "qwen3_next"])
def test_products_over_layers_refuse_mixers_by_name(name):
    model = hw.load(hybrid(name))
    record = model.record(IDS)
    mixer = model.mixers[0]
    for analysis in (*OF_RECORDS, *OF_MODELS):
        with pytest.raises(
            AnalysisError, match=rf"{mixer.name} in layers? .*has no attention map; .*read layers one by"
        ):
            getattr(analyses, analysis)(
                record if analysis in OF_RECORDS else model, *[IDS] * (analysis in OF_MODELS)
            )


def test_layers_without_a_mixer_between_them_are_multiplied():
    model = hw.load(hybrid("jamba"))  # attention in layers 1 and 3
    assert analyses.value_zeroing(model, IDS, first_layer=3, last_layer=3).attrs["layers"] == "[3]"
    assert analyses.gradient_rollout(model, IDS, first_layer=3).attrs["layers"] == "[3]"
    with pytest.raises(AnalysisError, match="in layer 2 "):
        analyses.value_zeroing(model, IDS, first_layer=1, last_layer=3)


def test_a_block_that_keeps_positions_apart_is_no_missing_layer():
    model = hw.load(
        built(
            "NemotronHForCausalLM",
            hybrid_override_pattern="*-*-",
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
        )
    )
    record = model.record(IDS)
    assert model.layers == [0, 2]
    first, second = (0.5 * record.pattern(layer).double().mean(1) + 0.5 * torch.eye(9) for layer in (0, 2))
    found = analyses.rollout(record, queries="all")
    torch.testing.assert_close(torch.from_numpy(found.values).double(), second @ first, atol=1e-6, rtol=1e-5)
    with pytest.raises(AnalysisError, match="layer 2 is missing"):
        analyses.rollout(hw.load("tasks-4l").record("When Mary and John went", layers=[0, 1, 3]))


CIRCUITS = ("edge_attribution", "information_flow_routes", "acdc", "trace_signals")


@pytest.mark.parametrize("name", ["jamba", "falcon_h1"])
def test_graphs_of_heads_and_mlps_refuse_mixers_by_name(name):
    model, other = hw.load(hybrid(name)), IDS.clone()
    other[0, 3] = 17
    for analysis in CIRCUITS:
        function = getattr(analyses, analysis)
        given = (IDS, other) if function.about.inputs == "model+pairs" else (IDS,)
        with pytest.raises(
            AnalysisError, match=rf"graph of heads and MLPs .*{model.mixers[0].name} in layers"
        ):
            function(model, *given)


def test_graphs_refuse_blocks_of_mlps_alone_by_name():
    model = hw.load(
        built(
            "NemotronHForCausalLM",
            hybrid_override_pattern="*-*-",
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
        )
    )
    with pytest.raises(
        AnalysisError, match="block 1 of NemotronHForCausalLM holds NemotronHMLP without attention"
    ):
        analyses.information_flow_routes(model, IDS)
