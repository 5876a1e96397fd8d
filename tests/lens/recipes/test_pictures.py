"""Recipes for text-to-image models (`pictures.py`).

Seen to fail with the strength left out, and with the relevance of the unwanted concept added.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_diffusers

import headwater as hw


def test_strengthening_multiplies_the_words_weights_by_the_relevance(tmp_path):
    model = hw.load(tiny_diffusers.pixel_pipeline(tmp_path / "tiny"))
    vector = {"0.0": 2.0, "0.1": 1.0, "1.0": 0.5, "1.1": 0.0}
    edits = hw.recipes.concept_strengthening([3], vector)
    told = {edit.of.heads[0]: edit.of.factor for edit in edits}
    assert told == {"0.0": 2.0, "1.0": 0.5, "1.1": 0.0}
    adjusted = hw.recipes.concept_strengthening(
        [3], vector, {"0.0": 0.5, "1.1": 3.0}, strength=0.5, least=0.0
    )
    told = {head: edit.of.factor for edit in adjusted for head in edit.of.heads}
    assert told == {"0.0": 1.75, "0.1": 1.5, "1.0": 1.25, "1.1": 0.0}
    plain = model.generate("a red cat", seed=1, output_type="pt")
    with model.part("cross").edit(*edits):
        assert not torch.equal(model.generate("a red cat", seed=1, output_type="pt"), plain)
