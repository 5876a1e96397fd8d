"""Circuit files from strangers: what holds a circuit is read, and everything else is refused in one line.

Mutations seen to fail: the look for declarations left out, values not held to their types, names not held to text, the
size not asked for, NaN let through, graphs not looked at before they are written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from headwater.analyses.circuits import _graph_files
from headwater.analyses.circuits._graph_files import read_circuit, write_circuit
from headwater.lens.errors import AnalysisError


def circuit() -> nx.DiGraph:
    graph = nx.DiGraph(question="Which?", model="tiny", pairs=3)
    graph.add_node("embed", kind="embed")
    graph.add_node("0.1", kind="head", layer=0, head=1, score=0.5)
    graph.add_node("0.1.v", kind="input", layer=0, input="v")
    graph.add_node("logits", kind="logits")
    graph.add_edge("0.1.v", "0.1", kind="inside")
    graph.add_edge("embed", "0.1.v", kind="edge", input="v", score=-1.25)
    graph.add_edge("0.1", "logits", kind="edge", input="logits", score=2.0)
    return graph


def same(one: nx.DiGraph, other: nx.DiGraph) -> bool:
    return (
        dict(one.nodes(data=True)) == dict(other.nodes(data=True))
        and list(one.edges(data=True)) == list(other.edges(data=True))
        and one.graph == other.graph
    )


@pytest.mark.parametrize(
    ("name", "form"), [("a.graphml", None), ("a.json", None), ("viewer.json", "neuronpedia")]
)
def test_what_was_written_is_read(tmp_path: Path, name: str, form: Any) -> None:
    graph = circuit()
    graph.graph["paper"] = "name <with> & \"signs\" that 'XML' has"
    assert same(graph, read_circuit(write_circuit(graph, tmp_path / name, form)))


@pytest.mark.parametrize(("name", "form"), [("a.graphml", None), ("a.json", None), ("v.json", "neuronpedia")])
@pytest.mark.parametrize("value", [math.nan, math.inf, [1, 2], np.float32(1), object()])
@pytest.mark.parametrize("place", ["node", "edge", "graph"])
def test_what_no_reader_takes_is_not_written(
    tmp_path: Path, name: str, form: Any, value: Any, place: str
) -> None:
    graph = circuit()
    about = {"node": graph.nodes["0.1"], "edge": graph.edges["0.1", "logits"], "graph": graph.graph}[place]
    about["score"] = value
    (tmp_path / name).write_text("old")
    with pytest.raises(AnalysisError, match=r"can not write .*; change or remove") as told:
        write_circuit(graph, tmp_path / name, form)
    assert "\n" not in str(told.value)
    assert (tmp_path / name).read_text() == "old"


@pytest.mark.parametrize("given", [None, nx.Graph(), nx.MultiDiGraph(), "a.json"])
def test_what_is_no_graph_is_one_line(tmp_path: Path, given: Any) -> None:
    with pytest.raises(AnalysisError, match=r"a circuit is a networkx\.DiGraph"):
        write_circuit(given, tmp_path / "a.json")


@pytest.mark.parametrize("path", [None, 5, b"a.json"])
def test_what_is_no_path_is_one_line(path: Any) -> None:
    with pytest.raises(AnalysisError, match=r"a path is the name|a circuit is a networkx.DiGraph, or a file"):
        write_circuit(circuit(), path)
    with pytest.raises(AnalysisError):
        read_circuit(path)


def test_files_of_older_versions_name_mlps_with_a_space(tmp_path: Path) -> None:
    graph = nx.relabel_nodes(circuit(), {"0.1": "mlp 3"})
    graph.add_edge("mlp 3", "logits", kind="edge", score=2.0)
    graph.nodes["mlp 3"].update(kind="mlp", layer=3)
    read = read_circuit(write_circuit(graph, tmp_path / "old.json"))
    assert same(read, nx.relabel_nodes(graph, {"mlp 3": "mlp.3"}))
    assert "mlp.3" in read


def content(**changes: Any) -> dict[str, Any]:
    return {**nx.node_link_data(circuit(), edges="links"), **changes}


def with_node(**about: Any) -> dict[str, Any]:
    found = content()
    return {**found, "nodes": [*found["nodes"], {"id": "0.2", "kind": "head", "layer": 0, "head": 2} | about]}


def with_edge(**about: Any) -> dict[str, Any]:
    found = content()
    link = {"source": "embed", "target": "logits", "kind": "edge", "score": 1.0} | about
    return {**found, "links": [*found["links"], link]}


def viewer(**changes: Any) -> dict[str, Any]:
    return {**_graph_files.as_neuronpedia(circuit()), **changes}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no JSON object"),
        ({}, "wrote$"),
        (content(directed=False), "no directions"),
        (content(multigraph=True), "no directions"),
        (content(nodes=3), "wrote$"),
        (with_node(id=7), "node 7 is not named by a text"),
        (with_node(id="x" * 201), "text of 1 to 200 signs"),
        (with_node(kind="script"), "is of kind 'script'; there are embed, logits"),
        (with_node(kind=None), "is of kind 'None'"),
        (with_node(layer="0"), "layer='0', not a whole number from 0"),
        (with_node(head=-1), "head='-1', not a whole number"),
        (with_node(layer=True), "layer='True', not a whole number"),
        (with_node(score="high"), "score='high', not a finite number"),
        (with_node(extra={"a": 1}), "'extra' of type dict, not a text or a number"),
        (with_edge(score=[1]), "'score' of type list"),
        (with_edge(score=float("nan")), "NaN is not a number that JSON knows"),
        (with_edge(kind="arrow"), "is of kind 'arrow'; there are edge, inside"),
        (with_edge(target="9.9"), "node '9.9' is of kind 'None'"),
        (content(graph={"question": ["a"]}), "the graph holds 'question' of type list"),
        (viewer(metadata={}), "wrote$"),
        (viewer(metadata={"headwater": {"incoming_graph_data": [[0, 1]]}}), "'incoming_graph_data' of type list"),
        (viewer(links=[{"source": "embed", "target": "z", "headwater": {"kind": "edge"}}]), "'z', which is no node"),
    ],
)  # fmt: skip
def test_json_that_is_no_circuit(tmp_path: Path, given: Any, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    refused(file, message)


def refused(file: Path, message: str) -> None:
    with pytest.raises(AnalysisError, match=message) as caught:
        read_circuit(file)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400 + len(str(file))


def test_json_that_goes_too_deep_or_counts_too_far(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text in ("[" * 100_000, '{"nodes": ' + "9" * 10_000 + "}", "{", "\x00"):
        file.write_text(text, encoding="utf-8")
        refused(file, "is not a graph")
    file.write_bytes(b"\xff\xfe{\x00}\x00")
    refused(file, "is not a graph")


LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>
<graphml><graph edgedefault="directed"><node id="&c;"/></graph></graphml>"""
OUTSIDE = """<!DOCTYPE x [<!ENTITY secret SYSTEM "file:///etc/hostname">]>
<graphml><graph edgedefault="directed"><node id="&secret;"/></graph></graphml>"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "<!DOCTYPE is not taken, since entities can grow without end"),
        (OUTSIDE, "<!DOCTYPE is not taken"),
        ("<graphml", "is not a graph"),
        ("<html/>", "is not a graph"),
        ('<graphml><graph edgedefault="directed"><node id="&what;"/></graph></graphml>', "is not a graph"),
    ],
    ids=["laughs", "outside", "broken", "html", "unknown entity"],
)
def test_graphml_that_is_no_circuit(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.graphml"
    file.write_text(text, encoding="utf-8")
    refused(file, message)


def test_graphml_of_another_kind_or_with_other_values(tmp_path: Path) -> None:
    written = write_circuit(circuit(), tmp_path / "good.graphml").read_text(encoding="utf-8")
    file = tmp_path / "a.graphml"
    for old, new, message in (
        ('edgedefault="directed"', 'edgedefault="undirected"', "no directions"),
        (">inside<", ">arrow<", "is of kind 'arrow'"),
        (">-1.25<", ">NaN<", "score='nan', not a finite number"),
        (">-1.25<", ">much<", "is not a graph"),
        (">head<", ">heads<", "is of kind 'heads'"),
    ):
        assert old in written
        file.write_text(written.replace(old, new), encoding="utf-8")
        refused(file, message)


def test_files_that_are_too_large_or_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a.json"
    folder.mkdir()
    refused(folder, "is not a plain file")
    monkeypatch.setattr(_graph_files, "MOST_BYTES", 2**20)
    file = tmp_path / "b.json"
    file.write_text(json.dumps(content(more="x" * 2**20)), encoding="utf-8")
    refused(file, "is larger than 1 MiB")
