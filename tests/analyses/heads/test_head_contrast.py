"""Contrast of heads against hooks on the output projection of an untouched model.

Mutations seen to fail: hidden tokens hidden from themselves too; the outlier rule with "or".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

TEXTS = [[5, 9, 31, 4, 8, 22], [17, 3, 9, 40]]
WRITTEN = [" ".join(f"w{token}" for token in text) for text in TEXTS]


def last_z(twin: torch.nn.Module, ids: list[int], name: str) -> np.ndarray:
    """z of the last token [layer, head, 8] in float64."""
    found = []
    modules = [m for path, m in twin.named_modules() if path.endswith(f"attn.{name}")]
    handles = [m.register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1])) for m in modules]
    with torch.no_grad():
        twin(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(found).unflatten(-1, (4, 8)).numpy()


@pytest.mark.parametrize(("name", "projection"), [("gpt2", "c_proj"), ("llama", "o_proj")])
def test_every_rule_by_hand(pairs: Callable, name: str, projection: str) -> None:
    pair = pairs(name)
    found = analyses.head_contrast(pair.model, WRITTEN, group=[0, 2], strongest=2)
    for text, ids in enumerate(TEXTS):
        left = [token for place, token in enumerate(ids) if place not in (0, 2)]
        absent = last_z(pair.twin, left, projection)
        apart = np.linalg.norm(last_z(pair.twin, ids, projection) - absent, axis=-1)
        np.testing.assert_allclose(found.divergence[text], apart, atol=2e-5)
        size = (absent**2).sum(-1)
        for layer in range(3):
            far = (apart[layer] > apart[layer].mean() + apart[layer].std()) & (
                size[layer] > size[layer].mean() + size[layer].std()
            )
            score = np.where(far, 0, apart[layer])
            np.testing.assert_array_equal(found.outlier[text, layer], far)
            np.testing.assert_array_equal(found.selected[text, layer], score > np.median(score))
        tops = np.sort(found.score[text].values, -1)[:, -2:].sum()
        assert float(found.token_score[text]) == pytest.approx(tops, rel=1e-6)
    np.testing.assert_allclose(found.mean_score, found.score.mean("batch"))


def test_an_outlier_is_one_by_both_rules(pairs: Callable) -> None:
    """Head 1.2 made large: it changes most and is largest without the group, so it leaves the selection."""
    model = pairs("gpt2").model
    with model.edit(hw.ScaleHeads({"1.2": 50.0})):
        found = analyses.head_contrast(model, WRITTEN)
    assert found.outlier[:, 1, 2].all()
    assert (found.score[:, 1, 2] == 0).all()
    assert not found.selected[:, 1, 2].any()
    assert (found.selected.sum("head") <= 2).all()


def test_blanks_and_hidden_tokens(pairs: Callable) -> None:
    """A token put in the place; and uniform attention over the tokens that are not hidden, in closed form."""
    pair = pairs("llama")
    found = analyses.head_contrast(pair.model, WRITTEN, group=1, how="blank", blank="w6")
    for text, ids in enumerate(TEXTS):
        blank = last_z(pair.twin, [ids[0], 6, *ids[2:]], "o_proj")
        expected = np.linalg.norm(last_z(pair.twin, ids, "o_proj") - blank, axis=-1)
        np.testing.assert_allclose(found.divergence[text], expected, atol=2e-5)


def test_hidden_from_uniform_heads(uniform: hw.HookedModel) -> None:
    ids = torch.tensor([TEXTS[0]])
    found = analyses.head_contrast(uniform, ids, group=[1, 4], how="hide")
    record = uniform.record(ids, keep=("qkv",))
    for layer in range(3):
        values = record.values[layer][0].double()
        apart = (values.mean(1) - values[:, [0, 2, 3, 5]].mean(1)).norm(dim=-1)
        np.testing.assert_allclose(found.divergence[0, layer], apart, atol=1e-5)


def test_second_runs_of_ones_own() -> None:
    """An image against noise, for a model that reads images; and texts against other texts."""
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    model = hw.load(hf.ViTModel(config).eval())
    one, other = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    found = analyses.head_contrast(
        model, [{"given": one}, {"given": one}], without=[{"given": other}, {"given": one}]
    )
    z = [model.head_outputs(image)[0, :, :, -1] for image in (one, other)]
    np.testing.assert_allclose(found.divergence[0], (z[0] - z[1]).norm(dim=-1), rtol=1e-4)
    assert (found.divergence[1] == 0).all()
    with pytest.raises(AnalysisError, match="without="):
        analyses.head_contrast(model, [{"given": one}])


def test_refusals(pairs: Callable) -> None:
    model = pairs("llama").model
    for settings, message in (
        ({"how": "melt"}, "how='melt'"),
        ({"position": 2}, "position=2"),
        ({"position": -6}, "position=-6"),
        ({"group": [9]}, "group holds 9"),
        ({"group": [0, 1, 2, 3]}, "group is all of example 1"),
        ({"without": ["w3"]}, "without holds 1 texts for 2"),
    ):
        with pytest.raises(AnalysisError, match=message):
            analyses.head_contrast(model, WRITTEN, **settings)
    with pytest.raises(AnalysisError, match="examples is empty"):
        analyses.head_contrast(model, [])
