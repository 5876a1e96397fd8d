"""The catalogue finds every file, and its settings read what a user types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pytest

from headwater import analyses
from headwater.analyses._catalogue import catalogue as _catalogue
from headwater.analyses._catalogue.catalogue import catalogue, entry
from headwater.analyses._catalogue.settings import Bounds, Setting, settings_of
from headwater.lens.errors import AnalysisError


def test_every_file_is_listed_and_says_what_it_is() -> None:
    folder = Path(_catalogue.__file__).parents[1]
    names = {file.stem for file in folder.glob("[!_]*/[!_]*.py")}
    assert set(catalogue()) == names >= {
        "rollout", "sink_rate", "find_sinks", "head_roles", "head_importance", "attention_distance",
    }  # fmt: skip
    for name, found in catalogue().items():
        assert found.name == name == found.function.__name__
        assert found.question.endswith("?")
        assert found.unit
        assert found.paper
        assert found.cost
        assert found.not_for
        assert found.inputs in ("record", "model", "model+examples", "model+pairs", "circuits")
        assert "Unit: " in (found.function.__doc__ or "")
        assert "Source: " in (found.function.__doc__ or "")


def test_settings_of_the_analyses() -> None:
    kinds = {setting.name: setting.kind for setting in entry("rollout").settings}
    assert kinds == {
        "queries": "positions",
        "residual": "number",
        "heads": "choice",
        "add_residual": "flag",
        "last_layer": "integer",
        "mixers": "choice",
        "keys": "positions",
        "without": "choice",
    }
    assert entry("rollout").setting("heads").choices == ("mean", "max", "min")
    importance = {setting.name: setting for setting in entry("head_importance").settings}
    assert "loss" not in importance  # a callable is for Python alone
    assert importance["normalise"].choices == ("layer", "last_layer_by_examples")
    assert importance["normalise"].optional
    for found in catalogue().values():
        for setting in found.settings:
            assert setting.help, f"{found.name}.{setting.name} has no help line"
            if not setting.required:
                setting.check(setting.default)


def example(
    record: object,
    amount: Annotated[float, "how much", Bounds(0, 1)] = 0.5,
    count: Annotated[int | None, "how many", Bounds(1)] = None,
    flag: bool = False,
    mode: Literal["a", "b"] | Sequence[float] = "a",
    where: int | Sequence[int] | Literal["all"] = "all",
    some: int | Sequence[int] = 0,
    label: str = "",
    loss: Callable[[int], int] | None = None,
) -> None: ...


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("amount", "0.25", 0.25),
        ("count", "3", 3),
        ("count", "none", None),
        ("flag", "yes", True),
        ("flag", "Off", False),
        ("mode", "b", "b"),
        ("where", "0, -1 4", [0, -1, 4]),
        ("where", "all", "all"),
        ("label", "any thing", "any thing"),
        ("label", " Mary", " Mary"),
    ],
)
def test_parse(name: str, text: str, value: object) -> None:
    settings = {setting.name: setting for setting in settings_of(example)}
    assert settings[name].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("amount", "half", "amount='half' is not a number from 0 to 1"),
        ("amount", "1.5", "amount=1.5 is outside its limits; give a number from 0 to 1"),
        ("amount", "nan", "outside its limits"),
        ("count", "0", "a whole number from 1 \\(or none\\)"),
        ("flag", "perhaps", "yes or no"),
        ("mode", "c", "one of a, b"),
        ("where", "first", 'whole numbers such as "0,-1", or "all"'),
        ("some", "all", "some='all' is not whole numbers such as \"0,-1\"$"),
    ],
)
def test_parse_refuses(name: str, text: str, message: str) -> None:
    settings = {setting.name: setting for setting in settings_of(example)}
    with pytest.raises(AnalysisError, match=message):
        settings[name].parse(text)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(AnalysisError, match="did you mean 'rollout'"):
        entry("rolout")
    with pytest.raises(AnalysisError, match="queries, residual, heads"):
        entry("rollout").setting("query")


def test_the_package_holds_functions_not_modules() -> None:
    assert set(dir(analyses)) > set(catalogue())
    for name in dir(analyses):
        assert callable(getattr(analyses, name))
    for name, found in catalogue().items():
        assert getattr(analyses, name) is found.function


def test_setting_is_plain_data() -> None:
    assert Setting("a", "number", 1.0) == Setting("a", "number", 1.0)
