"""Circuits on the command line: a printed or exported graph is judged again, and two are compared.

Mutations seen to fail: the circuit not handed on (a new one is searched), the files compared in the other order.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits.circuit_faithfulness import read_circuit, write_circuit
from headwater.analyses.circuits.edge_attribution import select_circuit

PAIR = ["the cat sat on a mat", "the mat sat on a cat"]


@pytest.fixture
def whole(headwater, tiny, tmp_path: Path) -> Path:
    """The scored graph as `headwater analyze edge_attribution --json` prints it."""
    file = tmp_path / "whole.json"
    run = headwater("analyze", "edge_attribution", *PAIR, "-m", tiny, "--json")
    file.write_text(run.stdout, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["c.json", "c.graphml"])
def test_an_exported_circuit_is_judged_from_its_file_alone(headwater, tiny, whole, tmp_path, name) -> None:
    circuit = select_circuit(read_circuit(whole), 12, "greedy")
    file = write_circuit(circuit, tmp_path / name)
    expected = analyses.circuit_faithfulness(hw.load(tiny), circuit, [(PAIR[0], PAIR[1])])
    run = headwater("analyze", "circuit_faithfulness", *PAIR, "-m", tiny, "--circuit", file, "--json")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    for variable in ("mean", "share", "measure", "whole", "nothing"):
        np.testing.assert_array_equal(
            np.array(found["data_vars"][variable]["data"], float), expected[variable].values
        )
    assert found["coords"]["edges"]["data"] == expected.edges.values.tolist()


def test_a_printed_graph_is_selected_from(headwater, tiny, whole) -> None:
    run = headwater(
        "analyze",
        "circuit_faithfulness",
        *PAIR,
        "-m",
        tiny,
        "--circuit",
        whole,
        "--set",
        "sizes=5 20",
        "--json",
    )
    assert json.loads(run.stdout)["coords"]["size"]["data"] == [5, 20]


def test_two_circuits_are_compared(headwater, whole, tmp_path) -> None:
    graphs = [select_circuit(read_circuit(whole), n) for n in (6, 20)]
    files = [write_circuit(graph, tmp_path / f"{n}.graphml") for n, graph in enumerate(graphs)]
    run = headwater("analyze", "circuit_overlap", *files, "--set", f"whole={whole}", "--json")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    expected = analyses.circuit_overlap(*graphs, read_circuit(whole))
    for variable in expected.data_vars:
        np.testing.assert_allclose(found["data_vars"][variable]["data"], expected[variable].values)
    assert found["data_vars"]["only_b"]["data"][2] > found["data_vars"]["only_a"]["data"][2]
    told = headwater("analyze", "circuit_overlap", *files).stdout
    assert "heads" in told
    assert "edges" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["circuit_overlap", "A.json"], ["1 circuit file given", "A.json B.json"]),
        (["circuit_overlap", "absent.json", "B.json"], ["absent.json", "No such file"]),
        (["circuit_overlap", "a.txt", "B.json"], ["a.txt", "ends in none of .graphml, .json, .safetensors"]),
        (["circuit_overlap", "A.json", "B.json", "--file", "C"], ["two circuit files", "--file"]),
        (["circuit_faithfulness", *PAIR, "-m", "TINY", "--circuit", "absent.json"], ["absent.json"]),
        (["rollout", PAIR[0], "-m", "TINY", "--circuit", "A.json"], ["--circuit", "rollout reads record"]),
        (["circuit_overlap", "--record", "run.safetensors"], ["--record", "circuit_overlap reads circuits"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_one_line_and_two(headwater, tiny, monkeypatch, tmp_path, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    run = headwater("analyze", *(tiny if word == "TINY" else word for word in arguments))
    assert run.exit_code == 2, (run.stdout, run.stderr, run.exception)
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    for word in words:
        assert word in run.stderr
