"""Relevance and gradient rollout against torch's own gradients of eager float64 attention.

Mutations seen to fail: the mean over heads before relu, values of the wrong key group, layers in the wrong order, the
identity left out, edits of head outputs ignored in the slope.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from attribution_oracle import weights_and_slopes
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.gradient_rollout import gradient_rollout
from headwater.analyses.tokens.relevance import relevance
from headwater.lens.errors import AnalysisError


def dense(pair, ids: Tensor, score, normalise: bool) -> np.ndarray:
    """The whole R of one text, written as the formula."""
    weights, slopes = weights_and_slopes(pair.twin, ids, score)
    eye = torch.eye(len(ids), dtype=torch.float64)
    found = eye
    for layer in (weights * slopes).relu().mean(1):
        mixed = layer + eye
        found = (mixed / mixed.sum(-1, keepdim=True) if normalise else mixed) @ found
    return found.detach().numpy()


def predicted(position: int = -1, wrong: int | None = None):
    """The logit of what the model predicts, less that of another token."""
    return lambda logits: (
        logits[:, position].max(-1).values - (0 if wrong is None else logits[:, position, wrong])
    )


@pytest.mark.parametrize(("analysis", "normalise"), [(relevance, False), (gradient_rollout, True)])
def test_matches_the_graph_of_eager_attention(pair, batch, analysis: Callable, normalise: bool) -> None:
    ids, mask = batch
    tokens = pair.model.to_tokens(ids, mask)
    found = analysis(pair.model, tokens, queries=[-1, 1])
    for row, real in enumerate(mask.bool()):
        expected = dense(pair, ids[row][real], predicted(), normalise)
        got = found.values[row][:, real.numpy()]
        np.testing.assert_allclose(got, expected[[-1, 1]], rtol=2e-4, atol=2e-5)
        assert np.isnan(found.values[row][:, ~real.numpy()]).all()
        if normalise:
            np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)


def test_difference_at_another_position_and_every_row(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.arange(5, 14)[None]
    found = relevance(pair.model, ids, queries="all", position=5, wrong="w9")
    np.testing.assert_allclose(
        found.values[0], dense(pair, ids[0], predicted(5, 9), False), rtol=2e-4, atol=2e-5
    )
    same = relevance(
        pair.model, ids, queries="all", measure=lambda logits: logits[:, 5].max(-1).values - logits[:, 5, 9]
    )
    np.testing.assert_allclose(same.values, found.values, atol=1e-6)
    assert found.attrs["position"] == 5


def test_an_answer_for_each_text(pairs: Callable) -> None:
    pair = pairs("gpt2")
    ids = torch.arange(5, 17).view(2, 6)
    found = relevance(pair.model, ids, answer=[11, 12], kind="log_probability")
    for row, answer in enumerate((11, 12)):
        score = lambda logits, answer=answer: logits[:, -1].log_softmax(-1)[:, answer]  # noqa: E731
        np.testing.assert_allclose(
            found.values[row, 0], dense(pair, ids[row], score, False)[-1], rtol=2e-4, atol=2e-5
        )


def test_upper_layers_alone(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.arange(5, 14)
    weights, slopes = weights_and_slopes(pair.twin, ids, predicted())
    eye = torch.eye(9, dtype=torch.float64)
    layer = (weights * slopes).relu().mean(1)[2] + eye
    found = gradient_rollout(pair.model, ids[None], first_layer=2)
    np.testing.assert_allclose(found.values[0, 0], (layer / layer.sum(-1, keepdim=True))[-1], atol=2e-5)
    with pytest.raises(AnalysisError, match="first_layer=7 has no attention"):
        gradient_rollout(pair.model, ids[None], first_layer=7)


def test_edits_of_head_outputs_are_those_of_scaled_weights(pairs: Callable) -> None:
    pair = pairs("gpt2")
    ids = torch.arange(5, 14)[None]
    twin = copy.deepcopy(pair.twin)
    with torch.no_grad():
        twin.transformer.h[1].attn.c_proj.weight[8:16] *= 0.4  # head 1 of four, each 8 wide
    expected = dense(replace(pair, twin=twin), ids[0], predicted(), False)
    with pair.model.edit(hw.ScaleHeads({"1.1": 0.4})):
        found = relevance(pair.model, ids, queries="all")
    np.testing.assert_allclose(found.values[0], expected, rtol=2e-4, atol=2e-5)
    with pair.model.edit(hw.AblateHeads("all")):
        np.testing.assert_allclose(relevance(pair.model, ids).values[0, 0], np.eye(9)[-1], atol=1e-7)


def test_one_token_and_one_head(pairs: Callable, one_head: hw.HookedModel) -> None:
    alone = gradient_rollout(pairs("llama").model, torch.tensor([[7]]))
    np.testing.assert_allclose(alone.values, [[[1.0]]])
    found = relevance(one_head, torch.arange(3, 9)[None])
    assert found.shape == (1, 1, 6)
    assert (found.values >= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer": "w3 w4"}, "is 2 tokens"),
        ({"answer": [99]}, "knows 0 to 60"),
        ({"answer": ["w3", "w4"]}, "2 tokens for 3 or more texts"),
        ({"position": 12}, "example 0 has 6 tokens; give a position from -6 to 5"),
        ({"kind": "rank"}, "give one of log_probability"),
        ({"measure": lambda logits: logits.sum()}, r"shape \(3,\), got \(\)"),
        ({"measure": lambda logits: logits[:, 0, 0] * torch.nan}, "example 0 is not finite"),
        ({"measure": lambda logits: logits[:, 0, 0], "answer": "w3"}, "give one of them"),
        ({"queries": [9]}, "has 6 tokens"),
    ],
)
def test_refusals_name_value_and_mend(pairs: Callable, settings: dict, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        relevance(pairs("llama").model, torch.arange(3, 21).view(3, 6), **settings)
