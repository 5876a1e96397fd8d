"""`@analysis` reads what an analysis is from its docstring, and writes it on what the analysis returns.

Seen to fail with settings above what the analysis itself wrote, and with the edits left out.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import networkx as nx
import pytest
import xarray as xr

import headwater as hw
from headwater.analyses._catalogue.about import unlabelled
from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.lens.errors import AnalysisError

LABELS = """

    Question: How much of {} is there,
    and where?
    Unit: share.
    Source: ours; https://example.org: held to nothing.
    Cost: nothing.
    Not for: anything.

    >>> 1 + 1
    2
    """


def made(result: Any) -> Any:
    def example(model: hw.HookedModel, amount: Annotated[float, "how much", Bounds(0, 1)] = 0.5) -> Any:
        return result

    example.__doc__ = "A sum." + LABELS
    return analysis(example)


def test_what_the_docstring_says() -> None:
    example = made(None)
    about = example.about
    assert about.question == "How much of {} is there, and where?"
    assert (about.unit, about.paper) == ("share", "ours; https://example.org: held to nothing")
    assert (about.cost, about.not_for, about.inputs) == ("nothing", "anything", "model")
    assert unlabelled(inspect.getdoc(example) or "") == "A sum."


def test_a_label_that_is_missing_is_named() -> None:
    def example(record: hw.Record) -> None:
        """A sum.

        Question: What?
        Unit: share.
        """

    with pytest.raises(ValueError, match="the docstring of example says nothing under Source, Cost, Not for"):
        analysis(example)


def test_results_say_what_they_are() -> None:
    model = hw.load("tasks-4l")
    edit = hw.Temperature(0.5)
    own = xr.DataArray([1.0], attrs={"amount": "as resolved"})
    with model.edit(edit):
        found = made(own)(model, amount=0.25)
    assert found.attrs["amount"] == "as resolved"
    assert found.attrs["model"] == "tasks-4l"
    assert "Temperature" in found.attrs["edits"]
    assert found.attrs["not_for"] == "anything"
    graph = made(nx.DiGraph())(model)
    assert (graph.graph["amount"], graph.graph["unit"]) == (0.5, "share")
    assert made(3)(model) == 3


def test_settings_are_held_to_their_limits() -> None:
    with pytest.raises(AnalysisError, match="amount=2 is outside its limits; give a number from 0 to 1"):
        made(None)(hw.load("tasks-4l"), 2)


def test_a_setting_that_netcdf_reserves_is_kept_under_a_free_name(tmp_path: Path) -> None:
    found = hw.analyses.find_sinks(hw.load("tasks-4l").record("Mary gave John a drink"))
    found.to_netcdf(tmp_path / "sinks.nc", engine="scipy")
    again = xr.load_dataset(tmp_path / "sinks.nc", engine="scipy")
    assert again.attrs["dimensions_"] == ""
    assert again.equals(found)


def test_no_attribute_makes_an_array_look_like_a_mapping() -> None:
    found = hw.analyses.raw_attention(hw.load("tasks-4l").record("Mary gave John a drink"), keys=[1, 2])
    assert found.attrs["keys_"] == "[1, 2]"
    assert found.astype("float32").dtype == "float32"
    own = made(xr.DataArray([1.0], attrs={"items": 3, "pop": 4}))(hw.load("tasks-4l"))
    assert (own.attrs["items_"], own.attrs["pop_"]) == (3, 4)
    assert not {"items", "pop"} & set(own.attrs)


@pytest.mark.slow
def test_without_docstrings_the_cause_is_named() -> None:
    code = "import headwater as hw; hw.analyses.rollout"
    run = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=120)
    assert "run it without -OO" in run.stderr.splitlines()[-1]


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(AnalysisError, match="example has no setting 'amounts'; did you mean 'amount'"):
        made(None)(hw.load("tasks-4l"), amounts=1)
