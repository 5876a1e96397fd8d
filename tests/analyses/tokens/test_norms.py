"""Norm-based maps against dense vectors in float64, and the identity that the terms add up to what the model computed.

Mutations seen to fail: the values of another key group, the norm's mean kept, the cross term of residual and
attention halved, the scale of Gemma 2's norm left out of the terms or of their sum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from limits import lower
from mixing_oracle import layers

import headwater as hw
from headwater.analyses._prompts.examples import Batch
from headwater.analyses._streams.attention_terms import mixings
from headwater.analyses.tokens.norms import norms
from headwater.lens.errors import AnalysisError

STAGES = {"attention": "attention", "residual": "residual", "norm": "behind"}


@pytest.mark.parametrize("stage", STAGES)
def test_matches_dense_vectors(pair, batch, stage: str) -> None:
    ids, mask = batch
    found = norms(pair.model, pair.model.to_tokens(ids, mask), queries=[-1, 1], stage=stage)
    for row, real in enumerate(mask.bool()):
        for place, layer in enumerate(layers(pair.twin, ids[row][real])):
            terms = getattr(layer, STAGES[stage])
            got = found.norm.values[row, place][:, real.numpy()]
            np.testing.assert_allclose(got, terms.norm(dim=-1)[[-1, 1]], rtol=1e-3, atol=2e-4)
            own = terms.diagonal().T
            others, alone = (terms.sum(1) - own).norm(dim=-1), own.norm(dim=-1)
            ratio = (others / (others + alone))[[-1, 1]]
            np.testing.assert_allclose(found.mixing_ratio.values[row, place], ratio, atol=1e-4)
    assert np.isnan(found.norm.values[:, 0, 0][~mask.bool().numpy()]).all()


def test_one_length_per_head(pair, batch) -> None:
    ids, mask = batch
    found = norms(
        pair.model, pair.model.to_tokens(ids, mask), queries=[-1, 0], stage="attention", per_head=True
    )
    for row, real in enumerate(mask.bool()):
        for place, layer in enumerate(layers(pair.twin, ids[row][real])):
            expected = layer.heads.norm(dim=-1)[:, [-1, 0]]
            got = found.norm.values[row, place][..., real.numpy()]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    assert found.norm.dims == ("batch", "layer", "head", "query", "key")


def test_terms_and_biases_are_what_the_model_has(pair) -> None:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    found = mixings(pair.model, Batch(ids, [0, 1]))
    for row in range(2):
        for mixing, layer in zip(found.values(), layers(pair.twin, ids[row]), strict=True):
            norms = () if mixing.first is None else (mixing.first,)
            np.testing.assert_allclose(mixing.mixed[row], layer.whole, atol=2e-4)
            total = mixing.total(True, norms)[row] + layer.left_out
            np.testing.assert_allclose(total, layer.whole, atol=2e-4)
            np.testing.assert_allclose(
                mixing.entering[row] * 0 + layer.behind.sum(1) + layer.left_out, layer.whole
            )


def test_all_rows_in_blocks(pairs: Callable, monkeypatch) -> None:
    pair = pairs("bert")
    ids = torch.randint(3, 61, (1, 20), generator=torch.Generator().manual_seed(4))
    lower(monkeypatch, "analyses._streams.attention_terms", FEW=3)
    found = norms(pair.model, ids, queries="all")
    for place, layer in enumerate(layers(pair.twin, ids[0])):
        np.testing.assert_allclose(
            found.norm.values[0, place], layer.behind.norm(dim=-1), rtol=1e-3, atol=2e-4
        )


def test_uniform_attention_that_writes_nothing(uniform: hw.HookedModel) -> None:
    """W_O is zero in this model: what reaches a position is its own stream alone."""
    found = norms(uniform, torch.arange(3, 11)[None])
    np.testing.assert_array_equal(found.norm.values[0, :, 0, :-1], 0)
    np.testing.assert_array_equal(found.mixing_ratio.values, 0)
    assert (found.norm.values[0, :, 0, -1] > 0).all()


def test_one_token_one_head_and_edits(pairs: Callable, one_head: hw.HookedModel) -> None:
    alone = norms(pairs("llama").model, torch.tensor([[7]]))
    assert alone.norm.shape == (1, 3, 1, 1)
    np.testing.assert_allclose(alone.mixing_ratio, 0, atol=1e-6)
    ids = torch.arange(3, 9)[None]
    both = norms(one_head, ids, stage="attention")
    each = norms(one_head, ids, stage="attention", per_head=True)
    np.testing.assert_allclose(each.norm.values[:, :, 0], both.norm.values, atol=1e-6)
    model = pairs("llama").model
    with model.edit(hw.TowardIdentity(1.0)):
        np.testing.assert_allclose(norms(model, ids).mixing_ratio, 0, atol=1e-5)
    with (
        model.edit(hw.ScaleHeads({"1.0": 0.5})),
        pytest.raises(AnalysisError, match="heads of layer 1 are scaled"),
    ):
        norms(model, ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"stage": "mlp"}, "attention, residual, norm"), ({"per_head": True}, 'needs stage="attention"')],
)
def test_refusals(pairs: Callable, settings: dict, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        norms(pairs("gpt2").model, torch.arange(3, 9)[None], **settings)
