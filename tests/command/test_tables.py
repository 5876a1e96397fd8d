"""Tables show the right number beside the right names, say what they leave out, and never show a control character."""

import networkx as nx
import numpy as np
import xarray as xr

from headwater.command import tables


def rows(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines]


def test_a_matrix_has_its_names_and_undefined_values_a_dash() -> None:
    values = np.array([[0.25, np.nan], [123456.0, 0.00012]])
    array = xr.DataArray(values, dims=("layer", "head"), coords={"layer": [4, 7]}, name="share")
    assert rows(tables.of(array)) == [
        ["share"],
        ["layer", "\\", "head", "0", "1"],
        ["4", "0.2500", "–"],
        ["7", "1.23e+05", "0.00012"],
    ]


def test_many_numbers_show_the_largest_with_the_tokens_of_their_own_row() -> None:
    values = np.zeros((2, 3, 20))
    values[1, 2, 3], values[0, 1, 19] = -9.0, 8.0
    tokens = [[f"{row}t{key}" for key in range(20)] for row in "ab"]
    array = xr.DataArray(values, dims=("batch", "head", "key"), coords={"token": (("batch", "key"), tokens)})
    found = rows(tables.of(array))
    assert "40 largest of 120" in " ".join(found[0])
    assert found[2] == ["1", "2", "3", "bt3", "-9.0000"]
    assert found[3] == ["0", "1", "19", "at19", "8.0000"]
    assert len(found) == 42


def test_lists_over_one_axis_stand_beside_each_other() -> None:
    names = np.array([f"t{i}" for i in range(50)])
    found = tables.of(xr.Dataset({"token": ("found", names), "score": ("found", np.arange(50.0))}))
    assert found[0] == "found: the first 40 of 50 (--json gives all)"
    assert rows(found[1:3]) == [["token", "score"], ["t0", "0.0000"]]
    assert len(found) == 42


def test_axes_of_length_one_go_into_the_title() -> None:
    array = xr.DataArray([[[0.5]]], dims=("batch", "query", "key"), coords={"query": [-1]}, name="rollout")
    assert tables.of(array) == ["rollout · query -1 · key 0: 0.5000"]


def test_control_characters_are_escaped() -> None:
    assert tables.cell("\x1b[2Jé\n\u202e\ud800") == "\\x1b[2Jé\\n\\u202e\\ud800"


def test_a_trace_shows_its_weights_and_nodes_their_scores() -> None:
    graph = nx.DiGraph()
    graph.add_edge("0.1@4", "1.2.k@4", kind="edge", weight=0.5, count=2)
    graph.add_edge("0.3@4", "1.2.k@4", kind="edge", weight=-1.5, count=1)
    graph.add_edge("1.2.k@4", "1.2@9", kind="inside")
    assert rows(tables.of_graph(graph)) == [
        ["4", "nodes,", "2", "edges", "with", "a", "weight"],
        ["from", "to", "weight", "count"],
        ["0.3@4", "1.2.k@4", "-1.5000", "1"],
        ["0.1@4", "1.2.k@4", "0.5000", "2"],
    ]
    nodes = nx.DiGraph()
    nodes.add_node("0.1", score=0.25)
    assert rows(tables.of_graph(nodes))[1:] == [["node", "score"], ["0.1", "0.2500"]]
    assert tables.of_graph(nx.DiGraph()) == ["0 nodes, 0 edges with a score"]


def test_patches_that_all_rows_share_and_sides_of_a_model_are_told() -> None:
    same = {"key_token": (("batch", "key"), [["[CLS]", "0,0"]] * 2)}
    assert rows(tables.of(xr.DataArray(np.zeros((2, 2)), dims=("batch", "key"), coords=same)))[1] == [
        "batch", "\\", "key", "0", "[CLS]", "1", "0,0"
    ]  # fmt: skip
    other = {
        "key_token": (("batch", "key"), [["a", "b"], ["a", "c"]]),
        "key_part": ("key", ["encoder", "decoder"]),
    }
    assert rows(tables.of(xr.DataArray(np.zeros((2, 2)), dims=("batch", "key"), coords=other)))[1][3:] == [
        "0", "encoder", "1", "decoder"
    ]  # fmt: skip


def test_words_of_an_answer_stand_beside_their_numbers() -> None:
    told = xr.DataArray([[0.5, 0.25]], dims=("batch", "token"), name="token_score").assign_coords(
        token=[0, 1], token_text=(("batch", "token"), [["two", "three"]])
    )
    lines = rows(tables.of(told))
    assert [line[:2] for line in lines[-2:]] == [["0", "two"], ["1", "three"]]
    assert [line[:2] for line in rows(tables.of(told.drop_vars("token_text")))[-2:]] == [
        ["0", "0.5000"],
        ["1", "0.2500"],
    ]
