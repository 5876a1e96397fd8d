"""Gradients times word embeddings against torch's own on the eager float64 model.

Mutation seen to fail: the sign of a sum dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from attribution_oracle import agree, input_slope, predicted

import headwater as hw
from headwater.analyses.tokens.input_x_gradient import input_x_gradient


def test_input_x_gradient_matches_torch_on_the_eager_model(pair, batch) -> None:
    ids, mask = batch
    tokens = pair.model.to_tokens(ids, mask)
    signed = input_x_gradient(pair.model, tokens)
    absolute = input_x_gradient(pair.model, tokens, signed=False)
    for row, real in enumerate(mask.bool()):
        embedded, slope = input_slope(pair.twin, ids[row][real], predicted)
        share = (embedded * slope).sum(-1)
        agree(signed.values[row], share, real)
        agree(absolute.values[row], share.abs(), real)


def test_input_x_gradient_of_a_measure_of_ones_own(one_head: hw.HookedModel) -> None:
    mine = input_x_gradient(one_head, torch.arange(3, 8)[None], measure=lambda logits: logits[:, -1, 4])
    named = input_x_gradient(one_head, torch.arange(3, 8)[None], answer="#4", kind="logit")
    np.testing.assert_allclose(mine, named, atol=1e-6)


def test_gradients_see_the_edits_that_are_on(pairs: Callable) -> None:
    model = pairs("gpt2").model
    ids = torch.arange(5, 11)[None]
    with model.edit(hw.Knockout(queries="all", keys=[2])):
        found = input_x_gradient(model, ids).values[0]
    assert found[2] == 0
    assert (found[[0, 1, 3, 4, 5]] != 0).all()
