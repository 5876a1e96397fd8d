"""The models that ship open by their names."""

from __future__ import annotations

import shutil

import pytest

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.examples.processor import of_pictures
from headwater.lens.models import embedded as module
from headwater.lens.models.embedded import check_embedded, embedded


@pytest.mark.parametrize("name", sorted(embedded()))
def test_embedded_models_open_by_name(name):
    model = hw.load(name)
    if embedded()[name]["reads"] == "prompts":
        assert model.generate("bright three left").size == (16, 8)
        return
    if embedded()[name]["reads"] == "text":
        assert model.tokenizer is not None
        assert model([0, 1]).isfinite().all()
    else:
        assert type(model.processor).__name__ != "UnusableProcessor"
        assert of_pictures(model.processor) is not None


@pytest.mark.parametrize("name", sorted(embedded()))
def test_a_description_is_one_whole_sentence(name):
    text = embedded()[name]["description"]
    assert text.endswith(".")
    assert ". " not in text


def test_a_changed_embedded_model_is_refused(tmp_path, monkeypatch):
    shutil.copytree(module.FOLDER, tmp_path / "models")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "models")
    check_embedded("tasks-4l")
    config = tmp_path / "models" / "tasks-4l" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    with pytest.raises(
        ModelError, match=r"tasks-4l is not the one that was shipped \(config.json was changed\)"
    ):
        check_embedded("tasks-4l")


@pytest.mark.parametrize("name", sorted(embedded()))
def test_digests_are_of_the_files_that_ship(name):
    check_embedded(name)
