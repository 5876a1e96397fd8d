"""Circuits run by themselves: identities at both ends, the dense run in between, selection, files.

Mutations seen to fail: circuit and complement exchanged, nodes' clean outputs taken for those computed anew,
greedy selection that follows one input of a head alone, pruning left out.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import edge_oracle
import networkx as nx
import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits._graphs import edges_of, pruned
from headwater.analyses.circuits.circuit_faithfulness import read_circuit, write_circuit
from headwater.analyses.circuits.edge_attribution import select_circuit
from headwater.lens.errors import HeadwaterError
from headwater.lens.loading import zoo
from headwater.lens.prompts import prompt_set


@functools.cache
def models(name: str):
    plain = zoo.build(name)
    twin = copy.deepcopy(plain).double()
    model = hw.load(plain)  # Gemma's own rows of padding are NaN in float64
    model.hf.double()
    return model, twin


@functools.cache
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 3, 6), generator=torch.Generator().manual_seed(4))
    return ids[0], ids[1]


def pairs():
    return list(zip(*prompts(), strict=True))


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 7] - logits[:, -1, 11]


@functools.cache
def attributed(name: str, key_values="head") -> nx.DiGraph:
    return analyses.edge_attribution(
        models(name)[0], pairs(), measure=measure, steps=2, key_values=key_values
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt_neox", "opt"])
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_all_edges_are_the_clean_run_and_none_the_corrupt(name: str, ablation) -> None:
    model, _ = models(name)
    graph = attributed(name)
    rounding = 1e-6 if name == "gemma3" else 1e-12  # Gemma's norms compute in float32
    clean, corrupt = (measure(model(ids)).numpy() for ids in prompts())
    found = analyses.circuit_faithfulness(
        model, graph, pairs(), measure=measure, sizes=[0, 10**6], ablation=ablation, draws=20
    )
    np.testing.assert_allclose(found["mean"].sel(score="faithfulness"), [0, 1], atol=rounding)
    np.testing.assert_allclose(found["mean"].sel(score="completeness"), [1, 0], atol=rounding)
    np.testing.assert_array_equal(found.whole, clean)
    if ablation == "resample":
        np.testing.assert_allclose(found.nothing, corrupt, atol=rounding)
    if ablation == "zero":  # nothing but biases reaches anything, so every prompt is the same
        assert np.ptp(found.nothing.values) < rounding


@pytest.mark.parametrize(
    ("name", "key_values"), [("gpt2", "head"), ("llama", "head"), ("llama", "kv"), ("gpt_neox", "head")]
)
def test_half_a_model_is_the_dense_run(name: str, key_values) -> None:
    model, twin = models(name)
    graph = attributed(name, key_values)
    edges = edges_of(graph)
    generator = torch.Generator().manual_seed(1)
    kept = {edge for edge in edges if torch.rand((), generator=generator) < 0.7}
    circuit = graph.copy()
    circuit.remove_edges_from([edge for edge in edges if edge not in kept])
    kept = set(edges_of(pruned(circuit)))
    clean, corrupt = prompts()
    with torch.no_grad():
        other = edge_oracle.run(twin, corrupt).nodes
        out = [
            measure(edge_oracle.run(twin, clean, other, changed, kv=key_values == "kv").logits)
            for changed in (set(edges) - kept, kept)
        ]
    found = analyses.circuit_faithfulness(model, circuit, pairs(), measure=measure, draws=20)
    assert found.edges.item() == len(kept)
    np.testing.assert_allclose(found.measure.sel(kept="circuit")[0], out[0], atol=1e-10)
    np.testing.assert_allclose(found.measure.sel(kept="complement")[0], out[1], atol=1e-10)
    whole, nothing = (measure(model(ids)).numpy() for ids in prompts())
    share = (out[0].numpy() - nothing) / (whole - nothing)
    np.testing.assert_allclose(found.share.sel(score="faithfulness")[0], share, rtol=1e-7)
    expected = (out[0].mean() - nothing.mean()) / (whole.mean() - nothing.mean())
    assert found["mean"].sel(score="faithfulness").item() == pytest.approx(float(expected))


@pytest.mark.parametrize("file", ["circuit.graphml", "circuit.json", "viewer.json"])
def test_a_file_holds_all_that_faithfulness_needs(file: str, tmp_path: Path) -> None:
    model, _ = models("llama")
    circuit = select_circuit(attributed("llama"), 60, "greedy")
    form = "neuronpedia" if file.startswith("viewer") else None
    path = write_circuit(circuit, tmp_path / file, form)
    again = read_circuit(path)
    assert dict(again.nodes(data=True)) == dict(circuit.nodes(data=True))
    assert {(u, v): d for u, v, d in again.edges(data=True)} == {
        (u, v): d for u, v, d in circuit.edges(data=True)
    }
    for name in ("question", "unit", "paper", "model", "pairs"):
        assert again.graph[name] == circuit.graph[name]
    asked = {"pairs": pairs(), "measure": measure, "draws": 20}
    direct = analyses.circuit_faithfulness(model, circuit, **asked)
    assert analyses.circuit_faithfulness(model, path, **asked).equals(direct)
    if form:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert {"metadata", "nodes", "links"} <= set(content)
        assert all({"source", "target", "weight"} <= set(link) for link in content["links"])


def hand_made() -> nx.DiGraph:
    """embed → 0.0 → mlp.0 → logits strong at the end; 0.1 with a strong edge that leads nowhere."""
    graph = nx.DiGraph()
    for name, kind in (
        ("embed", "embed"),
        ("0.0", "head"),
        ("0.1", "head"),
        ("mlp.0", "mlp"),
        ("logits", "logits"),
    ):
        graph.add_node(name, kind=kind)
    for head in ("0.0", "0.1"):
        for what in "qkv":
            graph.add_node(f"{head}.{what}", kind="input")
            graph.add_edge(f"{head}.{what}", head, kind="inside")
    edges = {
        ("embed", "0.0.v"): -1.0, ("embed", "0.0.q"): 0.1, ("embed", "0.1.k"): 9.0, ("0.0", "mlp.0"): 2.0,
        ("0.1", "mlp.0"): 0.2, ("mlp.0", "logits"): 5.0, ("embed", "logits"): 0.5, ("0.1", "logits"): -0.3,
    }  # fmt: skip
    for (u, v), score in edges.items():
        graph.add_edge(u, v, kind="edge", score=score)
    return graph


def test_selection_by_hand() -> None:
    graph = hand_made()
    top = select_circuit(graph, 4)
    # of 9, 5, 2 and -1 the first leads to a head that says nothing
    assert set(edges_of(top)) == {("mlp.0", "logits"), ("0.0", "mlp.0"), ("embed", "0.0.v")}
    assert "0.1" not in top
    assert "0.0.q" not in top
    greedy = select_circuit(graph, 4, "greedy")
    assert set(edges_of(greedy)) == set(edges_of(top)) | {("embed", "logits")}
    assert ("embed", "0.1.k") in edges_of(select_circuit(graph, 6, "greedy"))
    signed = select_circuit(graph, 4, signed=True)  # without -1 nothing leads from the embedding to 0.0
    assert set(edges_of(signed)) == {("embed", "logits")}
    assert edges_of(select_circuit(graph, 0)) == []
    assert set(edges_of(select_circuit(graph, 99))) == set(edges_of(graph))


def test_a_long_chain_is_pruned_to_its_end() -> None:
    graph = nx.DiGraph([("embed", "a"), ("a", "b"), ("b", "c"), ("d", "logits"), ("e", "d")])
    graph.add_node("logits")
    assert set(pruned(graph)) == {"embed", "logits"}


def test_nodes_select_every_edge_between_them() -> None:
    model, _ = models("gpt2")
    graph = analyses.edge_attribution(model, pairs(), measure=measure, steps=1, level="node")
    best = sorted(
        (n for n, about in graph.nodes(data=True) if "score" in about),
        key=lambda n: -abs(graph.nodes[n]["score"]),
    )
    circuit = select_circuit(graph, 4)
    assert {n for n, about in circuit.nodes(data=True) if about["kind"] in ("head", "mlp")} <= set(best[:4])
    assert all(u in {*best[:4], "embed"} for u, _ in edges_of(circuit))
    whole = select_circuit(graph, 10**6)
    assert set(edges_of(whole)) == set(edges_of(graph))


def test_intervals_are_the_bootstrap_of_the_ratio() -> None:
    model, _ = models("gpt2")
    found = analyses.circuit_faithfulness(
        model, attributed("gpt2"), pairs(), measure=measure, sizes=[40], draws=300, seed=5
    )
    kept, none, whole = (x.values for x in (found.measure[0, 0], found.nothing, found.whole))
    picks = np.random.default_rng(5).integers(3, size=(300, 3))
    drawn = [(kept[p] - none[p]).mean() / (whole[p] - none[p]).mean() for p in picks]
    assert float(found.low[0, 0]) == pytest.approx(np.quantile(drawn, 0.025))
    assert float(found.high[0, 0]) == pytest.approx(np.quantile(drawn, 0.975))
    single = analyses.circuit_faithfulness(
        model, attributed("gpt2"), pairs()[:1], measure=measure, sizes=[40]
    )
    assert np.isnan(single.low).all()


def test_a_fifth_of_the_edges_of_a_trained_model_keeps_its_indirect_objects() -> None:
    """Edges chosen on other texts than those they are judged on. The corrupt run answers the other way round, so a
    circuit that keeps 80 % of the logit difference has a faithfulness of 0.90."""
    model = hw.load("tasks-4l")
    examples = prompt_set("indirect_object", n=16, seed=3)
    graph = analyses.edge_attribution(model, examples[:8], steps=3)
    found = analyses.circuit_faithfulness(
        model, graph, examples[8:], sizes=[330], selection="greedy", draws=50
    )
    assert found.edges.item() / found.attrs["edges_of_model"] < 0.22
    assert found["mean"].sel(score="faithfulness").item() > 0.8
    kept = float(found.measure.sel(kept="circuit").mean() / found.whole.mean())
    assert kept > 0.8
    assert abs(found["mean"].sel(score="completeness").item()) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.add_edge("9.9", "logits", kind="edge"), "has no edge 9.9 → logits"),
        (lambda g: g.add_edge("1.1", "0.1.q", kind="edge"), "1.1 does not come before 0.1.q"),
    ],
)
def test_refuses_circuits_of_another_model(change, message: str) -> None:
    circuit = attributed("gpt2").copy()
    change(circuit)
    with pytest.raises(HeadwaterError, match=message):
        analyses.circuit_faithfulness(models("gpt2")[0], circuit, pairs(), measure=measure)


def test_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    model, _ = models("gpt2")
    same = [(ids, ids) for ids in prompts()[0]]
    with pytest.raises(HeadwaterError, match="no share of the difference is defined"):
        analyses.circuit_faithfulness(model, attributed("gpt2"), same, measure=measure, draws=2)
    for bad, message in (
        ({"selection": "up"}, "selection='up' is unknown"),
        ({"n": -1}, "n=-1 is outside its limits"),
    ):
        with pytest.raises(HeadwaterError, match=message):
            select_circuit(**{"graph": attributed("gpt2"), "n": 3} | bad)
    with pytest.raises(HeadwaterError, match="no scores"):
        select_circuit(nx.DiGraph([("embed", "logits")]), 3)
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    for path, message in (
        (broken, "not a graph"), (tmp_path / "none.json", "can not be read"), (tmp_path / "a.txt", "ends in none"),
    ):  # fmt: skip
        with pytest.raises(HeadwaterError, match=message):
            read_circuit(path)
    with pytest.raises(HeadwaterError, match="form='xml' is unknown"):
        write_circuit(nx.DiGraph(), tmp_path / "a.json", "xml")  # type: ignore[arg-type]
