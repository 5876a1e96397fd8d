"""Rollout and flow with sinks set aside, against dense products of eager float64 maps whose sink columns are removed.

Mutations seen to fail: the sink's column left in on the way down, and on the way up; row sums of the whole map; sinks
by their plain column sums; the tokens of padding as sinks; the layers that are not followed counted.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import networkx as nx
import numpy as np
import pytest
import torch
from limits import lower
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.agreement import agreement
from headwater.analyses.tokens.alti import alti
from headwater.analyses.tokens.faithfulness import faithfulness
from headwater.analyses.tokens.flow import flow, flow_graph
from headwater.analyses.tokens.globenc import globenc
from headwater.analyses.tokens.gradient_rollout import gradient_rollout
from headwater.analyses.tokens.input_x_gradient import input_x_gradient
from headwater.analyses.tokens.raw_attention import raw_attention
from headwater.analyses.tokens.rollout import rollout
from headwater.analyses.tokens.value_zeroing import value_zeroing
from headwater.command.output import as_text
from headwater.lens.errors import AnalysisError


def sinks_of(maps: Tensor, threshold: float) -> Tensor:
    """[batch, key] from dense [layer, batch, head, query, key]: mean weight per query that sees the key, averaged."""
    sees = maps > 0
    count = sees.sum(-2)
    share = torch.where(count > 0, maps.sum(-2) / count.clamp_min(1), torch.nan)
    share[count < count.amax(-1, keepdim=True) / 4] = torch.nan
    return torch.nanmean(share, dim=(0, 2)) > threshold


def dense(maps: Tensor, sinks: Tensor, weight: float) -> Tensor:
    """The product [batch, query, key] of rownorm((1 - w)·A·D + w·I) over layers of joined maps [layer, batch, …]."""
    eye = torch.eye(maps.shape[-1], dtype=torch.float64)
    product = eye.expand(maps.shape[1:])
    for layer in maps:
        mixed = (1 - weight) * torch.where(sinks[:, None], 0.0, layer) + weight * eye
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_rollout_without_sinks_is_the_dense_product(pair, batch, heads: str, monkeypatch) -> None:
    ids, mask = batch
    maps = pair.maps(ids, mask)
    threshold = 0.15 if pair.causal else 0.11
    lower(monkeypatch, "lens.records.sinks", SHARE=threshold)
    sinks = sinks_of(maps, threshold)
    assert sinks.any()
    assert not sinks[mask.bool()].all()
    expected = dense(maps.mean(2) if heads == "mean" else maps.amax(2), sinks, 0.3)
    record = pair.model.record(ids, attention_mask=mask)
    found = rollout(record, "all", residual=0.3, heads=heads, without="sinks")
    real = mask.bool().numpy()
    np.testing.assert_allclose(found.values[real], expected.numpy()[real], atol=2e-6)
    up = rollout(record, "all", residual=0.3, heads=heads, keys=[0, -1, 2], without="sinks")
    for row, kept in enumerate(mask.bool()):
        columns = kept.nonzero()[:, 0][[0, -1, 2]].numpy()
        np.testing.assert_allclose(up.values[row], found.values[row][:, columns], atol=2e-6)


def test_flow_without_sinks_is_the_flow_through_what_is_left(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.randint(3, 61, (1, 8), generator=torch.Generator().manual_seed(4))
    maps = pair.maps(ids)
    sinks = sinks_of(maps, 0.3)
    record = pair.model.record(ids)
    graph = nx.DiGraph()
    graph.add_nodes_from((0, j) for j in range(8))
    for depth, layer in enumerate(maps.mean(2), 1):
        mixed = dense(layer[None], sinks, 0.5)[0].numpy()
        for i, j in zip(*np.nonzero(mixed), strict=True):
            graph.add_edge((depth, i), (depth - 1, j), capacity=mixed[i, j])
    solver = nx.algorithms.flow.preflow_push
    expected = [nx.maximum_flow_value(graph, (3, 7), (0, j), flow_func=solver) for j in range(8)]
    found = flow(record, normalise=False, without="sinks")
    np.testing.assert_allclose(found.values[0, 0], expected, atol=2e-6)
    ours = flow_graph(record, without="sinks")
    assert set(ours.edges) == set(graph.edges)
    assert found.attrs["set_aside"] == ours.graph["set_aside"] == f"token 0 ('w{int(ids[0, 0])}')"


def test_a_row_whose_whole_mass_is_on_the_sink_stays(pure_sink: hw.HookedModel) -> None:
    """Without a residual nothing is left of it, so it is undefined."""
    record = pure_sink.record(torch.arange(3, 9)[None])
    np.testing.assert_allclose(rollout(record, "all", without="sinks").values[0], np.eye(6), atol=1e-6)
    np.testing.assert_allclose(flow(record, "all", without="sinks").values[0], np.eye(6), atol=1e-6)
    with pure_sink.edit(hw.Knockout(queries=[-1], keys=[0])):
        away = pure_sink.record(torch.arange(3, 9)[None])
    found = rollout(away, "all", add_residual=False, without="sinks").values[0]
    # the last row looks at others, but all that they see is the sink
    assert np.isnan(found).all()
    one = rollout(away, last_layer=0, add_residual=False, without="sinks").values[0, 0]
    assert one[0] == 0
    assert one.sum() == pytest.approx(1, abs=1e-4)


def test_a_sink_inside_the_text_and_a_small_rest_keep_their_digits(pairs: Callable) -> None:
    """A token that takes all but 1e-6 of each row: what is left is summed, not 1 less the sink."""
    model = pairs("llama").model
    with model.edit(hw.BiasKeys(bias=16.0, keys=[2])):
        record = model.record(torch.arange(3, 12)[None])
    maps = torch.stack([record.pattern(layer).double() for layer in record.layers])
    sinks = sinks_of(maps, 0.3)
    assert sinks[0].nonzero()[:, 0].tolist() == [2]
    found = rollout(record, "all", add_residual=False, without="sinks").values[0]
    expected = dense(maps.mean(2), sinks, 0.0)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert (rollout(record, "all", without="sinks").values[0, 3:, 2] == 0).all()


def test_only_the_followed_layers_say_what_a_sink_is(pairs: Callable) -> None:
    model = pairs("llama").model
    with model.edit(hw.BiasKeys(bias=16.0, keys=[2], heads=["2.0", "2.1", "2.2", "2.3"])):
        record = model.record(torch.arange(3, 19)[None])
    assert rollout(record, without="sinks").attrs["set_aside"] == "token 2 ('w5')"
    below = rollout(record, last_layer=1, without="sinks")
    assert below.attrs["set_aside"].startswith("no token: none receives more than 0.3")
    np.testing.assert_allclose(below.values, rollout(record, last_layer=1).values, atol=1e-6)


def test_a_result_that_shows_the_sink_alone_says_so(pure_sink: hw.HookedModel) -> None:
    ids, mask = torch.arange(3, 15).view(2, 6), torch.ones(2, 6).long()
    mask[1, :2] = 0
    record = pure_sink.record(ids, mask)
    told = rollout(record, [-1, 2], residual=0.1).attrs["one_token"]
    assert told.startswith(
        "text 0: token 0 ('#3'); text 1: token 0 ('#11') holds 0.999 of every answer: this shows"
    )
    assert told.endswith("without='sinks' sets it aside")
    # what a token keeps of itself is no answer about it: neither the sink's own row nor standing still counts
    assert "one_token" in rollout(record, "all", residual=0.1).attrs
    assert "one_token" not in rollout(record, 0).attrs
    assert "one_token" not in rollout(record, "all", residual=0.1, without="sinks").attrs
    assert "one_token" not in rollout(record, [-1, 2], residual=0.9).attrs
    assert "one_token" not in rollout(pure_sink.record(ids[:, :1])).attrs
    assert "one_token" in flow(pure_sink.record(ids), residual=0.05).attrs
    held = rollout(record, [-1, 2], residual=0.1, keys=[0, 1]).attrs["one_token"]
    assert held == told


def test_a_token_that_holds_all_without_being_a_sink(uniform: hw.HookedModel, pairs: Callable) -> None:
    """The first token of a causal model is a case of its own; another token is only named."""
    with uniform.edit(hw.Knockout(queries=[3], keys=[1, 2, 3])):
        record = uniform.record(torch.arange(3, 19)[None])
    told = rollout(record, 3, residual=0.0, last_layer=0).attrs["one_token"]
    assert told.startswith("token 0 ('#3') holds all of every answer: each layer of a causal model passes")
    model = pairs("bert").model
    with model.edit(hw.Knockout(queries=[5], keys=[0, 1, 2, *range(4, 12)])):
        record = model.record(torch.arange(3, 15)[None])
    told = rollout(record, 5, residual=0.0, last_layer=0).attrs["one_token"]
    assert told == "token 3 ('w6') holds all of every answer"


@pytest.mark.parametrize("judge", [agreement, faithfulness])
def test_comparisons_take_the_methods_without_sinks(pairs: Callable, judge: Callable) -> None:
    model = pairs("llama").model
    ids = torch.arange(3, 12)[None]
    record = model.record(ids)
    aside = {f.__name__: f(record, without="sinks").values[:, 0] for f in (rollout, flow)}
    expected = judge(
        model, ids, methods={**aside, "raw_attention": raw_attention(record).values[:, 0]}, draws=5
    )
    found = judge(model, ids, methods="rollout flow raw_attention", without="sinks", draws=5)
    plain = judge(model, ids, methods="rollout flow raw_attention", draws=5)
    first = next(iter(found.data_vars))
    np.testing.assert_allclose(found[first].values, expected[first].values, atol=1e-6)
    assert np.abs(plain[first].values - found[first].values).max() > 0.01
    with pytest.raises(
        AnalysisError, match="without='sinks' is for rollout and flow, and methods names neither"
    ):
        judge(model, ids, methods="raw_attention", without="sinks")


@pytest.mark.parametrize("judge", [agreement, faithfulness])
@pytest.mark.parametrize("without", [None, "sinks"])
def test_rules_of_a_backward_pass_stand_beside_a_product_of_maps(
    pairs: Callable, judge: Callable, without: str | None
) -> None:
    model = pairs("llama").model
    ids = torch.arange(3, 12)[None]
    told = {"kind": "log_probability", "answer": "w5"}
    rules = ("relp", "relp_released", "gim", "attnlrp")
    own = {rule: input_x_gradient(model, ids, rule=rule, **told).values for rule in rules}
    assert all(np.abs(a - b).max() > 1e-4 for a, b in combinations(own.values(), 2))
    product = rollout(model.record(ids), without=without).values[:, 0]
    expected = judge(model, ids, methods={"rollout": product, **own}, **told, draws=5)
    found = judge(model, ids, methods=["rollout", *own], without=without, **told, draws=5)
    assert found.attribution.values.tolist()[:5] == ["rollout", *rules]
    for name in ("mean", next(iter(found.data_vars))):
        np.testing.assert_allclose(found[name].values, expected[name].values, atol=1e-6)


def test_the_command_line_says_it(pure_sink: hw.HookedModel) -> None:
    record = pure_sink.record(torch.arange(3, 9)[None])
    assert "\none token: token 0 ('#3') holds 0.9" in as_text(rollout(record, residual=0.1))
    assert "\nset aside: token 0 ('#3')\n" in as_text(rollout(record, without="sinks"))


def test_other_products_say_it_too(pairs: Callable) -> None:
    model = pairs("llama").model
    ids = torch.arange(3, 12)[None]
    with model.edit(hw.BiasKeys(bias=30.0, keys=[0])):
        found = [
            f(model, ids, queries=[-1], **more)
            for f, more in (
                (alti, {}),
                (globenc, {}),
                (value_zeroing, {}),
                (gradient_rollout, {"answer": "w5"}),
            )
        ]
    for each in found:
        share = float(each[0, 0, 0] / each[0, 0].sum())
        assert ("one_token" in each.attrs) == (share > 0.9), each.name
    told = next(each.attrs["one_token"] for each in found if each.name == "value_zeroing")
    assert told.startswith("token 0 ('w3') holds")
    assert told.endswith("of every answer: each layer of a causal model passes shares to earlier tokens, and the first one gathers them")  # fmt: skip # noqa: E501
    assert "one_token" not in value_zeroing(model, ids, queries=[-1], first_layer=2).attrs


def test_the_choice_is_held_to_its_names(pairs: Callable) -> None:
    record = pairs("llama").model.record(torch.arange(3, 9)[None])
    with pytest.raises(AnalysisError, match=r"without='sink' is unknown; give one of sinks \(or none\)"):
        rollout(record, without="sink")
