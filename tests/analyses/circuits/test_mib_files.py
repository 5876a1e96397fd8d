"""Circuits in the files of the benchmark MIB: names and places held to the form as it is published, read back whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits._graphs import edges_of
from headwater.analyses.circuits.circuit_faithfulness import read_circuit, write_circuit
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 7] - logits[:, -1, 11]


def pairs() -> list[Any]:
    ids = torch.randint(3, 90, (3, 2, 6), generator=torch.Generator().manual_seed(4))
    return [tuple(pair) for pair in ids]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> hw.HookedModel:
    return hw.load(zoo.build(request.param))


@pytest.fixture(scope="module")
def graph(model: hw.HookedModel) -> nx.DiGraph:
    return analyses.edge_attribution(model, pairs(), measure=measure, steps=2, draws=1)


def published(layers: int, heads: int, parallel: bool) -> dict[str, tuple[int, int]]:
    """The edges of the form with their row and column, counted as the authors' code counts them."""
    forward, backward, found = {"input": 0}, {}, {}
    for layer in range(layers):
        for head in range(heads):
            forward[f"a{layer}.h{head}"] = 1 + layer * (heads + 1) + head
            for number, letter in enumerate("qkv"):
                backward[f"a{layer}.h{head}<{letter}>"] = layer * (3 * heads + 1) + number * heads + head
        forward[f"m{layer}"] = 1 + layer * (heads + 1) + heads
        backward[f"m{layer}"] = layer * (3 * heads + 1) + 3 * heads
    backward["logits"] = layers * (3 * heads + 1)
    stream = ["input"]
    for layer in range(layers):
        own = [f"a{layer}.h{head}" for head in range(heads)]
        readers = [f"{name}<{letter}>" for name in own for letter in "qkv"]
        for sources, into in ((stream, readers), (stream if parallel else stream + own, [f"m{layer}"])):
            found |= {f"{u}->{v}": (forward[u], backward[v]) for u in sources for v in into}
        stream = [*stream, *own, f"m{layer}"]
    return found | {f"{u}->logits": (forward[u], backward["logits"]) for u in stream}


def theirs(u: str, v: str) -> str:
    """The published name of an edge of ours."""
    names = [name.replace("embed", "input").replace("mlp.", "m") for name in (u, v)]
    names = [re.sub(r"^(\d+)\.(\d+)", r"a\1.h\2", name) for name in names]
    names = [re.sub(r"\.([qkv])$", r"<\1>", name) for name in names]
    return "->".join(names)


def test_the_json_is_the_published_form(model, graph, tmp_path: Path) -> None:
    circuit = analyses.select_circuit(graph, 60)
    told = json.loads(write_circuit(circuit, tmp_path / "importances.json", "mib").read_text())
    parallel = model.name.startswith("GPTNeoX") or "neox" in model.name.lower()
    cfg = {"n_layers": len(model.layers), "n_heads": model.n_heads, "d_model": model.d_model}
    assert told["cfg"] == {**cfg, "parallel_attn_mlp": parallel}
    edges = published(cfg["n_layers"], cfg["n_heads"], parallel)
    assert set(told["edges"]) == set(edges)
    inside = {theirs(u, v): circuit.edges[u, v]["score"] for u, v in edges_of(circuit)}
    assert {name for name, about in told["edges"].items() if about["in_graph"]} == set(inside)
    assert all(told["edges"][name]["score"] == score for name, score in inside.items())
    assert told["nodes"]["logits"]["in_graph"]
    assert told["nodes"]["input"] == {"in_graph": True}

    held = load_file(write_circuit(circuit, tmp_path / "importances.safetensors", "mib"))
    assert held["edges_scores"].shape == (
        1 + cfg["n_layers"] * (cfg["n_heads"] + 1),
        max(c for _, c in edges.values()) + 1,
    )
    for name, place in edges.items():
        assert held["edges_in_graph"][place] == told["edges"][name]["in_graph"]
        assert float(held["edges_scores"][place]) == pytest.approx(told["edges"][name]["score"], rel=1e-6)


@pytest.mark.parametrize("file", ["a.json", "a.safetensors"])
def test_circuits_and_whole_graphs_are_read_back(model, graph, file: str, tmp_path: Path) -> None:
    circuit = analyses.select_circuit(graph, 60)
    for given in (circuit, graph):
        again = read_circuit(write_circuit(given, tmp_path / file, "mib"))
        scores = {edge: graph.edges[edge]["score"] for edge in edges_of(given)}
        assert {edge: again.edges[edge]["score"] for edge in edges_of(again)} == pytest.approx(
            scores, rel=1e-6
        )
        found = analyses.circuit_faithfulness(model, again, pairs(), measure=measure, draws=2)
        expected = analyses.circuit_faithfulness(model, given, pairs(), measure=measure, draws=2)
        np.testing.assert_allclose(found["mean"], expected["mean"], atol=1e-6)
    path = write_circuit(circuit, tmp_path / file, "mib")
    every = read_circuit(path, every_edge=True)
    assert set(edges_of(every)) == set(edges_of(graph))
    assert set(edges_of(analyses.select_circuit(every, 20))) == set(
        edges_of(analyses.select_circuit(circuit, 20))
    )


@pytest.mark.parametrize("file", ["a.json", "a.safetensors"])
def test_scores_of_nodes_are_read_back(file: str, tmp_path: Path) -> None:
    model = hw.load(zoo.build("gpt2"))
    given = analyses.edge_attribution(model, pairs(), measure=measure, steps=1, level="node", draws=1)
    again = read_circuit(write_circuit(given, tmp_path / file, "mib"))
    scores = {name: s for name, s in given.nodes(data="score") if s is not None}
    assert {name: s for name, s in again.nodes(data="score") if s is not None} == pytest.approx(
        scores, rel=1e-6
    )
    two = (analyses.select_circuit(each, 4) for each in (given, again))
    assert len({frozenset(edges_of(each)) for each in two}) == 1


def small() -> dict[str, Any]:
    cfg = {"n_layers": 1, "n_heads": 1, "d_model": 8, "parallel_attn_mlp": False}
    edges = {name: {"score": 0.5, "in_graph": True} for name in published(1, 1, False)}
    nodes = {name: {"in_graph": True} for name in ("input", "a0.h0", "m0", "logits")}
    return {"cfg": cfg, "nodes": nodes, "edges": edges}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["cfg"].update(n_layers=10**6), "describes more than"),
        (lambda d: d["cfg"].update(n_heads="2"), "n_heads='2', not a whole number"),
        (lambda d: d.update(cfg=[]), "cfg is no table"),
        (lambda d: d["edges"].update({"m0->a0.h0<q>": {"score": 1.0}}), "no edge 'm0->a0.h0<q>'"),
        (lambda d: d["edges"].update({"a9.h9->logits": {"score": 1.0}}), "no edge"),
        (lambda d: d["nodes"].update({"a7.h7": {"in_graph": True}}), "no node 'a7.h7'"),
        (lambda d: d["edges"]["m0->logits"].update(score="big"), "score='big'"),
        (lambda d: d["edges"].update({"m0->logits": 3}), "described by no table"),
        (lambda d: d["nodes"]["m0"].update(neurons=[True]), "chooses neurons"),
        (lambda d: d.update(edges=[1]), "no tables by name"),
    ],
)
def test_strangers_json_is_refused_in_one_line(change, message: str, tmp_path: Path) -> None:
    content = small()
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert len(edges_of(read_circuit(path))) == 8
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(AnalysisError, match=message) as told:
        read_circuit(path)
    assert "\n" not in str(told.value)


def test_strangers_tensors_are_refused_in_one_line(tmp_path: Path) -> None:
    path, cfg = tmp_path / "a.safetensors", json.dumps(small()["cfg"])
    held = {
        "edges_scores": torch.zeros(3, 5), "edges_in_graph": torch.ones(3, 5, dtype=torch.bool),
        "nodes_in_graph": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    save_file(held, path, {"cfg": cfg})
    assert len(edges_of(read_circuit(path))) == 8
    for other, metadata, message in (
        ({"edges_scores": torch.zeros(3, 6)}, {"cfg": cfg}, r"of shape \(3, 5\)"),
        ({"edges_scores": torch.full((3, 5), torch.nan)}, {"cfg": cfg}, "not a finite number"),
        ({"neurons_in_graph": torch.ones(3, 8)}, {"cfg": cfg}, "whole heads"),
        ({}, {"cfg": "{"}, "cfg"),
        ({}, None, "holds no cfg"),
    ):
        save_file(held | other, path, metadata)
        with pytest.raises(AnalysisError, match=message) as told:
            read_circuit(path)
        assert "\n" not in str(told.value)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(AnalysisError, match="first 8 bytes"):
        read_circuit(path)
    with pytest.raises(AnalysisError, match="is a pickle"):
        read_circuit(tmp_path / "a.pt")


def test_graphs_that_the_form_has_no_place_for_are_refused(tmp_path: Path) -> None:
    model = hw.load(zoo.build("llama"))
    shared = analyses.edge_attribution(model, pairs(), measure=measure, steps=1, key_values="kv", draws=1)
    with pytest.raises(AnalysisError, match='give key_values="head"'):
        write_circuit(shared, tmp_path / "a.json", "mib")
    sampled = analyses.edge_attribution(model, pairs(), measure=measure, how="exact", sample=5, draws=1)
    with pytest.raises(AnalysisError, match=r"5 of its \d+ edges have a score"):
        write_circuit(sampled, tmp_path / "a.json", "mib")
    bare = nx.DiGraph()
    bare.add_node("embed", kind="embed")
    with pytest.raises(AnalysisError, match="does not say the shape"):
        write_circuit(bare, tmp_path / "a.json", "mib")
