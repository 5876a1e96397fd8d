"""Gradients at word embeddings against torch's own on the eager float64 model, and integrated gradients' identities.

Mutations seen to fail: the sign of a sum dropped, the 1-norm for the 2-norm, gradients of the wrong text of
a batch, weights of the integral not halved, the baseline's embedding left out of the path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attribution_oracle import input_slope
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.input_gradient import input_gradient
from headwater.analyses.tokens.input_x_gradient import input_x_gradient
from headwater.analyses.tokens.integrated_gradients import integrated_gradients
from headwater.lens.errors import AnalysisError

SMOOTH = (
    "gpt2",
    "llama",
    "mistral",
    "gemma2",
    "bert",
)  # GPT-OSS switches experts on the path, which makes jumps


def predicted(logits: Tensor) -> Tensor:
    return logits[:, -1].log_softmax(-1).max(-1).values


def test_match_torch_on_the_eager_model(pair, batch) -> None:
    ids, mask = batch
    tokens = pair.model.to_tokens(ids, mask)
    norm = input_gradient(pair.model, tokens)
    shifted = not hasattr(pair.twin, "model")  # GPT-2 and BERT have layer norms alone
    if not shifted:
        total = input_gradient(pair.model, tokens, reduce="sum")
    else:
        with pytest.raises(AnalysisError, match="slopes sum to 0"):
            input_gradient(pair.model, tokens, reduce="sum")
    signed, absolute = (
        input_x_gradient(pair.model, tokens),
        input_x_gradient(pair.model, tokens, signed=False),
    )
    for row, real in enumerate(mask.bool()):
        embedded, slope = input_slope(pair.twin, ids[row][real], predicted)
        share = (embedded * slope).sum(-1)
        for found, expected in (
            *([] if shifted else [(total, slope.sum(-1).abs())]),
            (norm, slope.norm(dim=-1)),
            (signed, share),
            (absolute, share.abs()),
        ):
            got = found.values[row, real.numpy()]
            np.testing.assert_allclose(
                got, expected, rtol=2e-3, atol=2e-5 * float(expected.abs().max()) + 1e-7
            )
            assert np.isnan(found.values[row, ~real.numpy()]).all()


def path_sum(pair, ids: Tensor, answer: int, start: Tensor | None, points: int = 600) -> np.ndarray:
    """The integral as a plain midpoint sum in float64."""
    table, kept = pair.twin.get_input_embeddings(), []

    def put(module, args, output):
        begin = torch.zeros_like(output) if start is None else start.expand_as(output)
        t = (torch.arange(points, dtype=torch.float64)[:, None, None] + 0.5) / points
        kept.append(((1 - t) * begin + t * output).detach().requires_grad_())
        kept.append((output - begin).detach())
        return kept[0]

    handle = table.register_forward_hook(put)
    try:
        logits = pair.twin(ids.expand(points, -1)).logits
    finally:
        handle.remove()
    score = logits[:, -1].log_softmax(-1)[:, answer].sum()
    found = torch.autograd.grad(score, kept[0])[0].mean(0)
    return (found * kept[1][0]).sum(-1).detach().numpy()


@pytest.mark.parametrize("baseline", ["blank", "mean"])
@pytest.mark.parametrize("name", SMOOTH)
def test_integrated_gradients_match_a_plain_sum(pairs: Callable, name: str, baseline: str) -> None:
    pair = pairs(name)
    ids = torch.arange(5, 11)
    with torch.no_grad():
        table = pair.twin.get_input_embeddings()(torch.arange(61))  # Gemma's table scales what it gives
    start = table[3] if baseline == "blank" else table.mean(0)
    found = integrated_gradients(
        pair.model, ids[None], baseline=baseline, blank="w3", answer="w9", tolerance=0.001
    )
    expected = path_sum(pair, ids, 9, start)
    np.testing.assert_allclose(found.values[0], expected, atol=0.01 * np.abs(expected).sum())


@pytest.mark.parametrize("name", SMOOTH)
def test_shares_add_up_to_the_change_from_the_baseline(pairs: Callable, name: str, batch) -> None:
    pair, (ids, mask) = pairs(name), batch
    found = integrated_gradients(
        pair.model, pair.model.to_tokens(ids, mask), baseline="blank", blank="w3", answer="w9", tolerance=0.01
    )
    for row, real in enumerate(mask.bool()):
        forms = torch.stack([ids[row][real], torch.full((int(real.sum()),), 3)])
        with torch.no_grad():
            chances = pair.twin(forms).logits[:, -1].log_softmax(-1)[:, 9]
        change = float(chances[0] - chances[1])
        size = np.nansum(np.abs(found.values[row]))
        assert abs(np.nansum(found.values[row]) + found.gap.values[row] - change) < 1e-4
        assert abs(found.gap.values[row]) <= 0.01 * size


def test_zero_baseline_of_a_model_with_layer_norm(pairs: Callable) -> None:
    """Position embeddings keep GPT-2's stream away from zero."""
    pair = pairs("gpt2")
    ids = torch.arange(5, 11)
    found = integrated_gradients(pair.model, ids[None], answer="w9", tolerance=0.001, baseline="zero")
    expected = path_sum(pair, ids, 9, None)
    np.testing.assert_allclose(found.values[0], expected, atol=0.01 * np.abs(expected).sum())


def test_no_way_to_go_and_one_token(pairs: Callable, one_head: hw.HookedModel) -> None:
    model = pairs("bert").model
    same = integrated_gradients(model, torch.full((1, 4), 3), baseline="blank", blank="w3")
    np.testing.assert_array_equal(same, 0)
    assert same.steps.values == [16]
    assert input_gradient(one_head, torch.tensor([[5]])).shape == (1, 1)
    mine = input_x_gradient(one_head, torch.arange(3, 8)[None], measure=lambda logits: logits[:, -1, 4])
    named = input_x_gradient(one_head, torch.arange(3, 8)[None], answer="#4", kind="logit")
    np.testing.assert_allclose(mine, named, atol=1e-6)


def test_shares_that_do_not_add_up_are_refused(pairs: Callable, monkeypatch) -> None:
    model = pairs("llama").model
    ids = torch.arange(5, 11)[None]
    more = integrated_gradients(model, ids, steps=1, blank="w3", baseline="blank", tolerance=0.01)
    assert more.steps.values[0] > 1
    monkeypatch.setattr(importlib.import_module("headwater.analyses.tokens.integrated_gradients"), "MOST", 2)
    with pytest.raises(AnalysisError, match=r"example 0 miss .* at 2 points; give tolerance="):
        integrated_gradients(model, ids, steps=1, baseline="blank", tolerance=1e-6)
    with pytest.raises(AnalysisError, match="mean, blank or zero"):
        integrated_gradients(model, ids, baseline="none")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="sum or norm"):
        input_gradient(model, ids, reduce="max")  # type: ignore[arg-type]


def test_gradients_see_the_edits_that_are_on(pairs: Callable) -> None:
    model = pairs("gpt2").model
    ids = torch.arange(5, 11)[None]
    with model.edit(hw.Knockout(queries="all", keys=[2])):
        found = input_x_gradient(model, ids).values[0]
    assert found[2] == 0
    assert (found[[0, 1, 3, 4, 5]] != 0).all()
