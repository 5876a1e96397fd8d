"""What users print is short: records, maps, parts, graphs and the catalogue say what they are; a notebook has a table.

Seen to fail with tokens that are not escaped, and with the edges of a graph in their own order.
"""

from __future__ import annotations

import copy
import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import pytest

import headwater as hw
from headwater.analyses._catalogue.about import ROOMS
from headwater.analyses._catalogue.graph import Graph
from headwater.kernels.maps.attention_map import AttentionMap
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
    listed = repr(hw.analyses.catalogue()).splitlines()
    assert len(listed) <= 30
    assert max(map(len, listed)) <= 100
    names = {word for line in listed for word in line.strip().split(", ") if line.startswith(" ")}
    assert {name.rstrip(",") for name in names} == set(hw.analyses.catalogue())


def facts(shown: Any) -> dict[str, str]:
    """The rows of the tables that a notebook shows, without the tags."""
    rows = re.findall(r"<tr>(.*?)</tr>", shown._repr_html_())
    cells = [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    assert len(cells) <= 30
    return {first: rest[-1] for first, *rest in cells}


def test_a_notebook_shows_facts_and_computes_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hw.load("tasks-4l")
    with model.edit(hw.Temperature(0.5, layers=[1])):
        record = model.record([PROMPT, "the store"])
        assert facts(model)["edits"].startswith("Temperature(tau=0.5")

    many = model.record(["the store"] * 5)

    def computed(*args: object, **kwargs: object) -> None:
        raise AssertionError("a map was computed")

    for name in ("tile", "block", "statistics", "row_blocks", "pooled"):
        monkeypatch.setattr(AttentionMap, name, computed)
    told = facts(record)
    assert told["prompt 1"] == "<bos> | the | store"
    assert (told["edits"], told["kept"], told["layers"]) == ("Temperature", "maps", "0, 1, 2, 3")
    told = facts(record.map(1))
    assert (told["visible"], told["edits"], told["key heads"]) == (
        "causal, padding hidden",
        "ScaleScores",
        "8",
    )
    told = facts(model)
    assert (told["context"], told["parameters"]) == (
        "256 tokens",
        f"{sum(p.numel() for p in model.hf.parameters()):,}",
    )
    assert "edits" not in told
    assert facts(many)["prompts"] == "5"
    strange = dataclasses.replace(
        record, strings=[["<script>x</script>", "\u202e"] + [""] * 13, record.strings[1]]
    )
    assert "<script" not in strange._repr_html_()
    assert facts(strange)["prompt 0"].startswith(r"<script>x</script> | \u202e")


def test_a_notebook_shows_the_strongest_edges() -> None:
    graph = Graph(unit="<b>nats</b>")
    for place, (u, v) in enumerate([("<script>", "logits"), ("0.1", "logits"), ("0.2", "logits")]):
        graph.add_edge(u, v, score=[0.5, -2.0, None][place])
    shown = graph._repr_html_()
    assert facts(graph)["unit"] == "<b>nats</b>"
    assert re.findall(r"<td[^>]*>([^<]*)</td>", shown)[-6:] == [
        "0.1",
        "logits",
        "-2",
        "&lt;script&gt;",
        "logits",
        "0.5",
    ]


def test_a_notebook_shows_the_catalogue_under_its_questions() -> None:
    shown = hw.analyses.catalogue()._repr_html_()
    assert shown.count("<details>") == len(ROOMS)
    assert all(f">{name}</td>" in shown for name in hw.analyses.catalogue())
    assert facts(hw.analyses.catalogue()["rollout"])["settings"].startswith("queries=(-1,), residual=0.5")
