"""The models that ship open by their names."""

from __future__ import annotations

import pytest

import headwater as hw
from headwater.lens.models.embedded import embedded


@pytest.mark.parametrize("name", sorted(embedded()))
def test_embedded_models_open_by_name(name):
    model = hw.load(name)
    assert model.tokenizer is not None
    assert model(model.tokenizer.bos_token or "a").isfinite().all()


@pytest.mark.parametrize("name", sorted(embedded()))
def test_a_description_is_one_whole_sentence(name):
    text = embedded()[name]["description"]
    assert text.endswith(".")
    assert ". " not in text
