"""Relevance against torch's own gradients of eager float64 attention.

Mutations seen to fail: the mean over heads before relu, values of the wrong key group, edits of head outputs ignored in
the slope.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attribution_oracle import likely, relevance_matrix

import headwater as hw
from headwater.analyses.tokens.relevance import relevance
from headwater.lens.errors import HeadwaterError


def test_relevance_matches_the_graph_of_eager_attention(pair, batch) -> None:
    ids, mask = batch
    found = relevance(pair.model, pair.model.to_tokens(ids, mask), queries=[-1, 1])
    for row, real in enumerate(mask.bool()):
        expected = relevance_matrix(pair.twin, ids[row][real], likely())
        got = found.values[row][:, real.numpy()]
        np.testing.assert_allclose(got, expected[[-1, 1]], rtol=2e-4, atol=2e-5)
        assert np.isnan(found.values[row][:, ~real.numpy()]).all()


def test_difference_at_another_position_and_every_row(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.arange(5, 14)[None]
    found = relevance(pair.model, ids, queries="all", position=5, wrong="w9")
    np.testing.assert_allclose(
        found.values[0], relevance_matrix(pair.twin, ids[0], likely(5, 9)), rtol=2e-4, atol=2e-5
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
            found.values[row, 0], relevance_matrix(pair.twin, ids[row], score)[-1], rtol=2e-4, atol=2e-5
        )


def test_edits_of_head_outputs_are_those_of_scaled_weights(pairs: Callable) -> None:
    pair = pairs("gpt2")
    ids = torch.arange(5, 14)[None]
    twin = copy.deepcopy(pair.twin)
    with torch.no_grad():
        twin.transformer.h[1].attn.c_proj.weight[8:16] *= 0.4  # head 1 of four, each 8 wide
    expected = relevance_matrix(twin, ids[0], likely())
    with pair.model.edit(hw.ScaleHeads({"1.1": 0.4})):
        found = relevance(pair.model, ids, queries="all")
    np.testing.assert_allclose(found.values[0], expected, rtol=2e-4, atol=2e-5)
    with pair.model.edit(hw.AblateHeads("all")):
        np.testing.assert_allclose(relevance(pair.model, ids).values[0, 0], np.eye(9)[-1], atol=1e-7)


def test_one_head(one_head: hw.HookedModel) -> None:
    found = relevance(one_head, torch.arange(3, 9)[None])
    assert found.shape == (1, 1, 6)
    assert (found.values >= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer": "w3 w4"}, "answer='w3 w4' is not one token"),
        ({"answer": [99]}, "answer=99 is no token"),
        ({"answer": ["w3", "w4"]}, "2 tokens for 3 or more texts"),
        ({"position": 12}, "example 0 has 6 tokens; give a position from -6 to 5"),
        ({"kind": "rank"}, "give one of log_probability"),
        ({"measure": lambda logits: logits.sum()}, r"shape \(3,\), got shape \(\)"),
        ({"measure": lambda logits: logits[:, 0, 0] * torch.nan}, "example 0 is not finite"),
        ({"measure": lambda logits: logits[:, 0, 0], "answer": "w3"}, "give one of them"),
        ({"queries": [9]}, "has 6 tokens"),
    ],
)
def test_refusals_name_value_and_mend(pairs: Callable, settings: dict, message: str) -> None:
    with pytest.raises(HeadwaterError, match=message):
        relevance(pairs("llama").model, torch.arange(3, 21).view(3, 6), **settings)
