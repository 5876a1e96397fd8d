"""Rollout and flow through layers without softmax attention (`_layer_map.py`), held to dense products."""

from collections.abc import Iterable

import networkx as nx
import pytest
import torch
from hybrid_models import hybrid, remembering
from networkx.algorithms.flow import edmonds_karp
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, RecordError
from headwater.lens.records.record import Record

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
KEEP = ("qk", "mixers")


def recorded(name: str, mask: Tensor | None = None) -> Record:
    return hw.load(remembering(hybrid(name))).record(IDS, mask, keep=KEEP)


def joined(record: Record, weight: float) -> dict[int, Tensor]:
    """Ã of every layer with a map, in order, dense in float64: by the formula of the docstring."""
    found = {}
    for layer in sorted([*record.layers, *(mixer.layer for mixer in record.mixers)]):
        if layer in record.layers:
            mean = record.pattern(layer).double().mean(1)
        else:
            size = record.effective_map(layer).map.dense().double().abs()
            mean = (size / size.sum(-1, keepdim=True)).mean(1)
        mixed = (1 - weight) * mean + weight * torch.eye(mean.shape[-1], dtype=torch.float64)
        found[layer] = mixed / mixed.sum(-1, keepdim=True)
    return found


def product(maps: Iterable[Tensor]) -> Tensor:
    whole, *others = maps
    for each in others:
        whole = each @ whole
    return whole


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "nemotron_h", "lfm2", "recurrent_gemma", "minimax"])
def test_rollout_is_the_product_of_all_layers(name: str) -> None:
    record = recorded(name)
    layers = joined(record, 0.3)
    expected = product(layers.values())
    down = analyses.rollout(record, "all", residual=0.3, mixers="effective")
    torch.testing.assert_close(torch.from_numpy(down.values).double(), expected, rtol=1e-4, atol=1e-6)
    up = analyses.rollout(record, "all", residual=0.3, keys="all", mixers="effective")
    torch.testing.assert_close(torch.from_numpy(up.values).double(), expected, rtol=1e-4, atol=1e-6)
    assert down.attrs["layers"] == str(list(layers))
    assert (down.attrs["not_covered"], down.attrs["mixers"]) == ("", "effective")
    mixers_alone = [each for layer, each in layers.items() if layer not in record.layers]
    assert all((each - torch.eye(12)).abs().max() > 0.1 for each in mixers_alone)  # they take part


def test_flow_goes_through_all_layers() -> None:
    record = recorded("qwen3_next")
    maps = list(joined(record, 0.5).values())
    graph = analyses.flow_graph(record, row=1, mixers="effective")
    for (depth, i), (_, j), capacity in graph.edges(data="capacity"):
        assert abs(capacity - float(maps[depth - 1][1, i, j])) < 1e-6
    assert len(graph.edges) == sum(int((each[1] > 0).sum()) for each in maps)
    found = analyses.flow(record, normalise=False, mixers="effective")
    for j in (0, 5, 11):
        flow, _ = nx.maximum_flow(graph, (len(maps), 11), (0, j), flow_func=edmonds_karp)
        assert abs(float(found[1, 0, j]) - flow) < 1e-5


def test_up_to_a_layer_takes_the_mixers_below_it_alone() -> None:
    record = recorded("jamba")
    for last in (0, 1, 2):
        found = analyses.rollout(record, "all", last_layer=last, mixers="effective")
        expected = product(list(joined(record, 0.5).values())[: last + 1])
        torch.testing.assert_close(torch.from_numpy(found.values).double(), expected, rtol=1e-4, atol=1e-6)


def test_padding_takes_no_part() -> None:
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    both = hw.load(hybrid("qwen3_next"))
    padded = analyses.rollout(both.record(IDS, mask, keep=KEEP), mixers="effective").values[1, 0, 4:]
    alone = analyses.rollout(both.record(IDS[1:, 4:], keep=KEEP), mixers="effective").values[0, 0]
    torch.testing.assert_close(torch.from_numpy(padded), torch.from_numpy(alone), rtol=1e-3, atol=1e-5)
    with pytest.raises(AnalysisError, match="layer 2 carries what stands at padding into the text"):
        analyses.rollout(recorded("lfm2", mask), mixers="effective")


def test_what_can_not_be_followed_is_refused_by_name() -> None:
    model = hw.load(hybrid("jamba"))
    with pytest.raises(
        AnalysisError, match=r"JambaMambaMixer in layers 0 and 2 .*keep=\(\"qk\", \"mixers\"\)"
    ):
        analyses.rollout(model.record(IDS, keep=KEEP))
    with pytest.raises(RecordError, match=r"record with keep=\('qk', 'mixers'\)"):
        analyses.rollout(model.record(IDS), mixers="effective")
    with pytest.raises(AnalysisError, match="layer 1 is missing from this record"):
        analyses.rollout(model.record(IDS, layers=[3], keep=KEEP), mixers="effective")
    with pytest.raises(AnalysisError, match="layer 0 of FalconH1ForCausalLM holds attention and a mixer"):
        analyses.flow(recorded("falcon_h1"), mixers="effective")


def test_a_model_of_attention_alone_is_as_without_the_setting() -> None:
    record = hw.load("tasks-4l").record("When Mary and John went to the store", keep=KEEP)
    plain, asked = analyses.rollout(record), analyses.rollout(record, mixers="effective")
    assert (plain.values == asked.values).all()
