"""Strength by distance on the grid, patch by patch on eager maps, and in closed form for uniform attention.

Mutation seen to fail: rows and columns of a grid that is not square exchanged.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater import analyses
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError, RecordError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def pair() -> tuple[hw.HookedModel, hf.ViTModel]:
    """A grid of 2 rows and 3 columns behind a class token."""
    torch.manual_seed(2)
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=(8, 12), patch_size=4, initializer_range=0.6,
    )  # fmt: skip
    plain = hf.ViTModel(config).eval()
    plain.set_attn_implementation("eager")
    return hw.load(copy.deepcopy(plain)), plain.double()


@pytest.mark.parametrize("rows", [99, 2])
def test_against_eager_maps_patch_by_patch(pair, rows: int, monkeypatch) -> None:
    model, twin = pair
    images = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        maps = torch.stack(twin(images.double(), output_attentions=True).attentions, 1).numpy()
    whole = AttentionMap.row_blocks
    monkeypatch.setattr(AttentionMap, "row_blocks", lambda self: whole(self, None, rows * 2 * 2 * 7))
    found = analyses.patch_distance(model.record(images), per_example=True)
    grid = [(n // 3, n % 3) for n in range(6)]
    for text, layer, head in ((0, 0, 0), (1, 1, 1), (0, 1, 0)):
        strength, ring, steps = np.zeros(3), [[], [], []], []
        for i, (r, c) in enumerate(grid):
            mine = np.zeros(3)
            sizes = np.zeros(3)
            for j, (s, d) in enumerate(grid):
                hop = max(abs(r - s), abs(c - d))
                mine[hop] += maps[text, layer, head, 1 + i, 1 + j]
                sizes[hop] += 1
            strength += mine / 6
            steps.append((mine * np.arange(3)).sum() / mine.sum())
            for hop in range(3):
                if sizes[hop]:
                    ring[hop].append(mine[hop] / sizes[hop])
        at = found.isel(batch=text, layer=layer, head=head)
        np.testing.assert_allclose(at.strength, strength, atol=1e-5)
        np.testing.assert_allclose(at.per_patch, [np.mean(values) for values in ring], atol=1e-5)
        assert float(at.mean_hops) == pytest.approx(np.mean(steps), abs=1e-5)
        own = maps[text, layer, head]
        assert float(at.to_prefix) == pytest.approx(own[1:, 0].mean(), abs=1e-5)
        assert float(at.from_prefix) == pytest.approx(own[0, 1:].sum(), abs=1e-5)


def test_uniform_attention(pair) -> None:
    """Each of 7 tokens gets 1/7: rings of the 2 × 3 grid hold 1, then 3 or 5, then 2 patches."""
    model, _ = pair
    with model.edit(hw.TowardUniform(1.0)):
        found = analyses.patch_distance(model.record(torch.randn(1, 3, 8, 12)))
    rings = np.array([1, (4 * 3 + 2 * 5) / 6, 4 * 2 / 6])
    np.testing.assert_allclose(found.strength[1, 1], rings / 7, atol=1e-6)
    np.testing.assert_allclose(found.per_patch, 1 / 7, atol=1e-6)
    np.testing.assert_allclose(found.to_prefix, 1 / 7, atol=1e-6)


def test_texts_have_no_grid(uniform: hw.HookedModel) -> None:
    with pytest.raises(AnalysisError, match="no grid of patches"):
        analyses.patch_distance(uniform.record(torch.tensor([[3, 4]])))


def test_the_picture_inside_of_a_text() -> None:
    """The second of two texts has its picture elsewhere; a patch sees earlier patches and the text before them."""
    plain = zoo.build("llava")
    given = zoo.inputs("llava", lengths=(11, 8))
    given["input_ids"][1] = torch.roll(given["input_ids"][1], 1)
    given["attention_mask"][1, 17] = 1
    record = hw.load(zoo.build("llava")).record(**given)
    with torch.no_grad():
        maps = torch.stack(plain(**given, output_attentions=True).attentions, 1).double().numpy()
    found = analyses.patch_distance(record, per_example=True)
    for text, start in enumerate((2, 3)):
        strength = np.zeros((*maps.shape[1:3], 3))
        for i, j in np.ndindex(9, 9):
            hop = max(abs(i // 3 - j // 3), abs(i % 3 - j % 3))
            strength[..., hop] += maps[text, :, :, start + i, start + j] / 9
        np.testing.assert_allclose(found.strength[text], strength, atol=1e-5)
        others = maps[text, :, :, start : start + 9].sum((2, 3)) / 9 - strength.sum(-1)
        np.testing.assert_allclose(found.to_prefix[text], others, atol=1e-5)
    with pytest.raises(AnalysisError, match="image=1, but batch row 0 has 1 pictures"):
        analyses.patch_distance(record, image=1)


def test_places_of_a_picture_have_no_order(pair) -> None:
    record = pair[0].record(torch.randn(1, 3, 8, 12))
    assert "distance" not in record.statistics
    assert "self" in record.statistics
    with pytest.raises(
        RecordError, match=r"says nothing of where patches .* analyses\.patch_distance counts"
    ):
        analyses.attention_distance(record)
    with pytest.raises(RecordError, match="'previous' counts places"):
        pair[0].record(torch.randn(1, 3, 8, 12), statistics=("previous",))
    assert (analyses.reference_frames(record, tau=0.0, gamma=0.0).frame != "bidirectional").all()
