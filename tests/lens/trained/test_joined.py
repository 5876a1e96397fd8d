"""A model that is made of two others says in one line what it lacks."""

import dataclasses

import pytest

from headwater.lens.errors import ModelError
from headwater.lens.loading.load import load
from headwater.lens.trained import registry
from headwater.lens.trained.joined import joined

NAME = "llava-small"


def test_what_is_missing_is_said_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(registry, "is_added", lambda name: name == "smollm2-135m")
    with pytest.raises(
        ModelError, match=r"dinov2-small has not been added; `headwater models add llava-small`"
    ):
        load(NAME)


def test_a_joined_model_names_parts_that_there_are() -> None:
    for each in joined().values():
        assert set(each.parts) <= set(registry.TRAINED)
        assert each.about
        assert dataclasses.asdict(each)["name"] == each.path.name
