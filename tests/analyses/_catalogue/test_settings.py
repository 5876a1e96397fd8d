"""Settings out of their limits are refused from Python as on the command line, before anything runs."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses._catalogue.catalogue import catalogue
from headwater.analyses._catalogue.settings import Setting
from headwater.lens.errors import AnalysisError

MODEL = hw.load("sink-2l-softmax")
RECORD = MODEL.record([3, 4, 5])
SETTINGS = [(name, setting) for name, found in catalogue().items() for setting in found.settings]


def source(name: str) -> list[Any]:
    """The record or model that the analysis reads, and something for each other argument that it needs."""
    entry = catalogue()[name]
    needed = [p for p in inspect.signature(entry.function).parameters.values() if p.default is p.empty]
    texts = {
        setting.name for setting in entry.settings if setting.required
    }  # the first fault is to be another
    given = ["a: b" if each.name in texts else object() for each in needed[1:]]
    return [RECORD if entry.inputs == "record" else MODEL, *given]


def called(name: str, setting: Setting, value: Any) -> None:
    """Call the analysis with one setting's value."""
    function, given = catalogue()[name].function, source(name)
    bound = inspect.signature(function).bind_partial(*given).arguments
    function(**{**bound, setting.name: value})


def outside(setting: Setting) -> list[tuple[Any, str]]:
    """Values that a setting does not take, and a piece of the line that says so."""
    low, high = setting.bounds.low, setting.bounds.high
    wrong: list[tuple[Any, str]] = []
    if setting.kind in ("number", "integer"):
        wrong += [(True, "is not a"), ("1", "is not a"), ([1], "is not a"), (float("nan"), " is ")]
        wrong += [] if low is None else [(low - 1, "is outside its limits; give a")]
        wrong += [] if high is None else [(int(high + 1), "is outside its limits; give a")]
        wrong += [(low, "is outside its limits; give a number above")] if setting.bounds.above else []
    if setting.kind == "integer":
        wrong += [(1.5, "is not a whole number")]
    if setting.kind == "flag":
        wrong += [(1, "is not True or False"), ("yes", "is not True or False")]
    if setting.kind == "choice":
        wrong += [("sideways", "is unknown; give one of"), (3, "is unknown; give one of")]
    if setting.kind == "positions":
        wrong += [
            ("first", "is not a list of whole"),
            ("0,-1", "is not a list of whole"),
            ([0, True], "is not a list"),
        ]
    if setting.kind == "text":
        wrong += [(5.0, "is not text"), (True, "is not text")]
    return wrong + ([] if setting.optional else [(None, " is ")])


@pytest.mark.parametrize(
    ("name", "setting"), SETTINGS, ids=[f"{name}.{each.name}" for name, each in SETTINGS]
)
def test_every_setting_of_every_analysis_is_held_to_its_limits(name: str, setting: Setting) -> None:
    for value, line in outside(setting):
        with pytest.raises(AnalysisError) as caught:
            called(name, setting, value)
        assert str(caught.value).startswith(f"{setting.name}=")
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "setting"), SETTINGS, ids=[f"{name}.{each.name}" for name, each in SETTINGS]
)
def test_python_and_command_line_say_the_same(name: str, setting: Setting) -> None:
    for text in [str(value) for value, line in outside(setting) if "outside" in line or "unknown" in line]:
        with pytest.raises(AnalysisError) as typed:
            setting.parse(text)
        value = text if setting.kind == "choice" else float(text) if setting.kind == "number" else int(text)
        with pytest.raises(AnalysisError) as given:
            called(name, setting, value)
        assert str(given.value) == str(typed.value)


def test_numbers_and_lists_of_numpy_and_torch_are_taken() -> None:
    settings = {each.name: each for each in catalogue()["find_sinks"].settings}
    for value in (np.float64(0.5), np.float32(0.5), 1, torch.tensor(0.5)):
        settings["alpha"].check(value)
    for value in ([1, 2], (1,), range(3), np.arange(3), torch.arange(3), np.int64(1), {1}):
        settings["dimensions"].check(value)
    settings["unit_rows"].check(np.bool_(True))


def test_a_checked_function_is_the_function_itself_to_a_reader() -> None:
    assert analyses.rollout.__name__ == "rollout"
    assert analyses.rollout.__doc__ == analyses.rollout.__wrapped__.__doc__
    assert list(inspect.signature(analyses.rollout).parameters)[:2] == ["record", "queries"]


def test_a_value_too_long_for_one_line_is_named_by_its_type() -> None:
    with pytest.raises(
        AnalysisError, match=r"^heads=an object of Tensor is unknown; give one of mean, max, min$"
    ):
        analyses.rollout(RECORD, heads=torch.zeros(9, 9, 9))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: analyses.select_circuit(None, -1), "n=-1 is outside its limits; give a whole number from 0"),
        (lambda: analyses.select_circuit(None, 1, "up"), "selection='up' is unknown; give one of top, greedy"),
        (lambda: analyses.flow_graph(RECORD, residual=2), "residual=2 is outside its limits; give a number from 0 "
         "to 1"),
        (lambda: analyses.between([1], [2], alpha=-1), "alpha=-1 is outside its limits; give a number from 0"),
        (lambda: analyses.inhibition_like(None, [], count=0), "count=0 is outside its limits; give a whole number "
         "from 1"),
    ],
)  # fmt: skip
def test_companions_are_held_to_theirs(call: Any, line: str) -> None:
    with pytest.raises(AnalysisError) as caught:
        call()
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["relevance", "patch", "suppressors"])
def test_an_answer_is_typed_as_a_word_or_as_an_id(name: str) -> None:
    answer = catalogue()[name].setting("answer")
    assert [answer.parse(text) for text in ("Mary", " Mary", "#17", "none")] == ["Mary", " Mary", "#17", None]
    assert answer.check(17) == 17


def test_what_may_name_a_file_is_told_by_its_type() -> None:
    """Sweeps and the dashboard leave such settings out, or take a list of texts in its place."""
    files = {(name, setting.name) for name, setting in SETTINGS if re.search(r"\bfiles?\b", setting.help)}
    assert {("text_heatmap", "texts"), ("segmentation", "masks"), ("edge_attribution", "resume")} <= files
    assert files <= {(name, setting.name) for name, setting in SETTINGS if setting.opens}
