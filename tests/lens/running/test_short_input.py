"""The input of short runs: ids where a model reads nothing else, else that on which it was opened."""

from __future__ import annotations

import pytest
import torch

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo
from headwater.lens.running.short_input import short_input


@pytest.mark.parametrize(
    ("name", "keys"), [("gpt2", {"input_ids"}), ("bert", {"input_ids"}), ("vit", {"pixel_values"})]
)
def test_models_of_one_input(name: str, keys: set[str]) -> None:
    found = short_input(hw.load(zoo.build(name)), 5)
    assert found.keys() == keys
    assert name == "vit" or found["input_ids"].shape == (1, 5)


@pytest.mark.parametrize("name", ["t5", "whisper", "clip", "llava"])
def test_every_part_runs_on_it(name: str) -> None:
    model = hw.load(zoo.build(name))
    for part in model.parts:
        with torch.no_grad():
            model.hf(**short_input(model.part(part)))


def test_a_model_of_which_no_input_is_known() -> None:
    model = hw.load(zoo.build("t5"))
    model.sample = {}
    with pytest.raises(ModelError, match="opened without a sample"):
        short_input(model)
