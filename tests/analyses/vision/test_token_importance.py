"""Importance of patches against the published formula on dense weights, and against what `PruneTokens` keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


def flowcut(record: hw.Record) -> torch.Tensor:
    """FlowCut's scores of the patches, [batch, layer, patch], from dense weights and values."""
    carried, found = None, []
    for layer in record.layers:
        a = record.pattern(layer).double()[:, :, 0, 1:].mean(1)
        v = record.values[layer].double()
        s = torch.softmax(torch.einsum("bhd,bhkd->bhk", v[:, :, 0], v), -1)[..., 1:].mean(1)
        score = (a / a.sum(-1, keepdim=True) + s / s.sum(-1, keepdim=True)) * v.mean(1)[:, 1:].abs().sum(-1)
        carried = score if carried is None else (carried + score) / 2
        found.append(carried)
    return torch.stack(found, 1)


@pytest.fixture(scope="module")
def tower():
    model = hw.load(zoo.build("vit"))
    return model, model.record(**zoo.inputs("vit"), keep="qkv")


def test_flow_is_flowcuts_formula(tower):
    _, record = tower
    found = hw.analyses.token_importance(record)
    np.testing.assert_allclose(found[:, :, 1:], flowcut(record), rtol=1e-4)
    assert found[:, :, 0].isnull().all()
    assert found.reader == "class"
    assert found.key_row.values[0].tolist() == [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("method", ["flow", "attention", "values"])
def test_the_best_tokens_are_those_that_pruning_keeps(tower, method):
    model, record = tower
    scores = hw.analyses.token_importance(record, method=method).sel(layer=0).values
    with model.edit(hw.PruneTokens({0: 4}, method)):
        kept = ~model.embeddings(**zoo.inputs("vit")).isnan().any(-1)
    for row in range(len(kept)):
        best = np.argsort(-np.nan_to_num(scores[row], nan=-1.0))[:4]
        assert sorted(best.tolist()) == kept[row].nonzero()[1:, 0].tolist()


def test_the_last_token_reads_in_a_language_model_and_all_read_without_a_class_token():
    llava = hw.load(zoo.build("llava"))
    given = zoo.inputs("llava")
    record = llava.record(**given, keep="qkv")
    found = hw.analyses.token_importance(record, method="attention")
    assert found.reader == "last"
    images = (given["input_ids"] == llava.image_token).numpy()
    assert np.isfinite(found.values).all(1)[images].all()
    assert np.isnan(found.values[:, 0][~images]).all()
    last = record.pattern(1)[:, :, -1].mean(1).numpy()
    np.testing.assert_allclose(found.sel(layer=1).values[images], last[images], rtol=1e-5)
    siglip = hw.load(zoo.build("siglip")).record(**zoo.inputs("siglip"), keep="qkv").part("vision")
    received = hw.analyses.token_importance(siglip)
    expected = siglip.pattern(0).double().mean((1, 2)) * siglip.values[0].double().mean(1).abs().sum(-1)
    assert received.reader == "all"
    np.testing.assert_allclose(received.sel(layer=0), expected, rtol=1e-4)


def test_a_record_without_values_is_refused_with_the_mend(tower):
    model, _ = tower
    with pytest.raises(AnalysisError, match="keep='qkv'"):
        hw.analyses.token_importance(model.record(**zoo.inputs("vit")))
