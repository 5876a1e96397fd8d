"""Results come back from a file as they were, bit for bit, and the same result gives the same bytes."""

import networkx as nx
import numpy as np
import pytest
import xarray as xr

import headwater as hw
from headwater.analyses._sweeps.kept import pack, unpack
from headwater.lens.errors import SweepError

UNIT = {"analysis": "x", "number": 0}
TEXTS = ["Mary gave John a drink", "John gave Mary a drink"]


@pytest.fixture(scope="module")
def model():
    return hw.load("tasks-4l")


@pytest.mark.parametrize(
    "name", ["rollout", "find_sinks", "head_importance", "logit_lens", "value_zeroing", "patch"]
)
def test_results_of_analyses_come_back_identical(model, name):
    asked = hw.analyses.catalogue()[name]
    given = {"record": (model.record(TEXTS, keep=asked.keep),), "model+pairs": (model, TEXTS[:1], TEXTS[1:])}
    result = asked.function(*given.get(asked.inputs, (model, TEXTS)))
    content = pack(result, UNIT)
    assert pack(asked.function(*given.get(asked.inputs, (model, TEXTS))), UNIT) == content
    unit, found = unpack(content, "the file")
    assert unit == UNIT
    xr.testing.assert_identical(result, found)
    assert _numbers(found) == _numbers(result)


def _numbers(result):
    """The bits of every array."""
    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name="array")
    found = {name: np.asarray(each.values) for name, each in result.variables.items()}
    return {name: (each.dtype, each.tobytes()) for name, each in found.items() if each.dtype.kind in "biuf"}


def test_a_graph_comes_back_as_it_was(model):
    graph = hw.analyses.edge_attribution(model, TEXTS[:1], TEXTS[1:])
    content = pack(graph, UNIT)
    _, found = unpack(content, "the file")
    assert isinstance(found, nx.DiGraph)
    assert len(found) == len(graph) > 2
    assert dict(found.nodes(data=True)) == dict(graph.nodes(data=True))
    assert list(found.edges(data=True)) == list(graph.edges(data=True))
    assert found.graph == graph.graph


def test_what_no_file_keeps_is_refused():
    with pytest.raises(SweepError, match="x gave float"):
        pack(0.5, UNIT)
    with pytest.raises(SweepError, match="holds a set"):
        pack(xr.DataArray(np.array([{1}], dtype=object), dims="a", name="odd"), UNIT)


def test_bytes_that_are_no_result_are_one_line(model):
    content = pack(hw.analyses.rollout(model.record(TEXTS[:1])), UNIT)
    for broken in (
        b"",
        content[:7],
        content[:100],
        content[:-1],
        content + b"x",
        b"\xff" * 100,
        content.replace(b"kind", b"kinb"),
    ):
        with pytest.raises(SweepError, match="is no file of a unit") as caught:
            unpack(broken, "the file")
        assert "\n" not in str(caught.value)
