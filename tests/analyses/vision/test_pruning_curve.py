"""Curves against runs in which the same patches are hidden, and against labels counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **sizes)
    hf = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(8.0 if weight.dim() == 2 else 1.0)
    return hw.load(hf), torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_numbers_are_those_of_runs_in_which_the_patches_are_hidden(classifier):
    model, pictures = classifier
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    tokens = model.to_tokens(pictures, label=labels)
    found = hw.analyses.pruning_curve(model, tokens, keep="0.25 1.0", scores="values", layer=0, draws=50)
    scores = hw.analyses.token_importance(model.record(pictures, keep="qkv"), method="values").sel(layer=0)
    plain, state = model(pictures).argmax(-1), model.embeddings(pictures)[:, 0].double()
    for row in range(6):
        best = np.argsort(-np.nan_to_num(scores[row].values, nan=-1.0))[:4]
        others = sorted(set(range(1, 17)) - set(best.tolist()))
        with model.edit(hw.Knockout("all", others, layers=[1, 2])):
            said = model(pictures[row : row + 1]).argmax(-1)
            moved = model.embeddings(pictures[row : row + 1])[0, 0].double()
        drift = 1 - torch.nn.functional.cosine_similarity(moved, state[row], -1)
        at = {"batch": row, "score": "values", "kept": 0.25}
        assert float(found.drift_per_example.sel(at)) == pytest.approx(float(drift), abs=1e-5)
        assert float(found.same_per_example.sel(at)) == float(said == plain[row])
        assert float(found.accuracy_per_example.sel(at)) == float(said == labels[row])
    assert float(found.drift.sel(score="values", kept=1.0)) == pytest.approx(0.0, abs=1e-6)
    assert found.whole == pytest.approx(float((plain == labels).double().mean()))
    assert found.patches.values.tolist() == [4, 16]


def test_the_random_control_is_the_mean_of_its_draws(classifier):
    model, pictures = classifier
    asked = {"keep": "0.5", "scores": "random", "draws": 10}
    single = [hw.analyses.pruning_curve(model, pictures, random_draws=1, seed=s, **asked) for s in (3, 4)]
    both = hw.analyses.pruning_curve(model, pictures, random_draws=2, seed=3, **asked)
    mean = sum(each.drift_per_example for each in single) / 2
    np.testing.assert_allclose(both.drift_per_example, mean, atol=1e-12)
    assert not np.allclose(single[0].drift_per_example, single[1].drift_per_example)
    assert "accuracy" not in both


def test_patches_of_the_tower_and_of_the_language_model_are_read_by_its_last_token():
    model = hw.load(zoo.build("llava"))
    given = dict(zoo.inputs("llava"))
    tokens = model.to_tokens(given.pop("input_ids"), given.pop("attention_mask"), **given)
    asked = {"keep": "0.34", "scores": "attention", "draws": 10, "layer": 0}
    of_text = hw.analyses.pruning_curve(model, tokens, **asked)
    of_tower = hw.analyses.pruning_curve(model.part("vision"), tokens, **asked)
    assert of_text.patches.item() == of_tower.patches.item() == 4
    assert np.isfinite(of_tower.drift_per_example).all()
    assert (of_tower.drift_per_example > 1e-6).all()
    state = model.embeddings(tokens)[:, -1].double()
    with model.edit(hw.PruneTokens({0: 0.34})):
        moved = model.embeddings(tokens)[:, -1].double()
        said = model(tokens)[:, -1].argmax(-1)
    drift = 1 - torch.nn.functional.cosine_similarity(moved, state, -1)
    np.testing.assert_allclose(of_text.drift_per_example.values.ravel(), drift, atol=1e-9)
    words = [f"#{int(said[0])}", f"#{int(said[1] + 1) % 96}"]
    right = hw.analyses.pruning_curve(model, tokens, answers=words, **asked)
    assert right.accuracy_per_example.values.ravel().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("setting", "told"), [
    ({"keep": "2"}, "up to 1"), ({"scores": "entropy"}, "unknown score"), ({"layer": 2}, "behind one of the layers"),
])  # fmt: skip
def test_what_can_not_be_is_refused(classifier, setting, told):
    model, pictures = classifier
    with pytest.raises(AnalysisError, match=told):
        hw.analyses.pruning_curve(model, pictures, **setting)


def test_what_is_named_twice_counts_once(classifier):
    model, pictures = classifier
    once = hw.analyses.pruning_curve(model, pictures, keep="0.5", scores="flow random", draws=10)
    twice = hw.analyses.pruning_curve(model, pictures, keep="0.5 0.5", scores="flow random flow", draws=10)
    assert once.equals(twice)
