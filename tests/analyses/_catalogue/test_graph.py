"""What users print is short: records, maps, parts, graphs and the catalogue say what they are in a line."""

from __future__ import annotations

import copy
from pathlib import Path

import headwater as hw
from headwater.lens.loading import zoo

PROMPT = "When Mary and John went to the store , John gave a drink to"


def test_printed_forms_are_one_line(tmp_path: Path) -> None:
    model = hw.load("tasks-4l")
    record = model.record(PROMPT)
    graph = hw.analyses.flow_graph(record)
    assert repr(graph) == f"Graph(75 nodes, {graph.number_of_edges()} edges)"
    assert repr(graph.subgraph([(0, 2), (1, 2)]).copy()).startswith("Graph(2 nodes")
    assert repr(copy.deepcopy(graph)) == repr(graph)
    whole = hw.analyses.edge_attribution(
        model, [(PROMPT, PROMPT.replace("John gave", "Mary gave"))], answer="Mary"
    )
    hw.analyses.write_circuit(whole, tmp_path / "circuit.json")
    for shown in (
        whole,
        hw.analyses.select_circuit(whole, 5),
        hw.analyses.read_circuit(tmp_path / "circuit.json"),
    ):
        assert repr(shown).startswith("Graph(")
    assert repr(record.map(1)) == "AttentionMap(1 × 8 heads × 15 queries × 15 keys, auto)"
    assert repr(record.map(1).T) == repr(record.map(1)) + ".T"
    cross = hw.load(zoo.build("bart"))
    assert repr(cross.parts["cross"]) == "Part('cross', 2 layers × 4 heads, of decoder × encoder)"
    for shown in (
        record,
        record.key_axis,
        model,
        cross,
        *cross.parts.values(),
        hw.analyses.catalogue()["flow"],
    ):
        assert len(repr(shown)) < 200
        assert "\n" not in repr(shown)
    assert len(repr(hw.analyses.catalogue())) < 5000
