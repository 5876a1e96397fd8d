"""Integrated gradients against a plain sum along the path, and the change from the baseline that the shares add up to.

Mutations seen to fail: weights of the integral not halved, the baseline's embedding left out of the path.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from limits import lower
from torch import Tensor

from headwater.analyses.tokens.integrated_gradients import integrated_gradients
from headwater.lens.errors import AnalysisError

SMOOTH = (
    "gpt2",
    "llama",
    "mistral",
    "gemma2",
    "bert",
)  # GPT-OSS switches experts on the path, which makes jumps


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


def test_no_way_to_go(pairs: Callable) -> None:
    model = pairs("bert").model
    same = integrated_gradients(model, torch.full((1, 4), 3), baseline="blank", blank="w3")
    np.testing.assert_array_equal(same, 0)
    assert same.steps.values == [16]


def test_shares_that_do_not_add_up_are_refused(pairs: Callable, monkeypatch) -> None:
    model = pairs("llama").model
    ids = torch.arange(5, 11)[None]
    more = integrated_gradients(model, ids, steps=1, blank="w3", baseline="blank", tolerance=0.01)
    assert more.steps.values[0] > 1
    lower(monkeypatch, "analyses.tokens.integrated_gradients", MOST=2)
    with pytest.raises(AnalysisError, match=r"example 0 miss .* at 2 points; give tolerance="):
        integrated_gradients(model, ids, steps=1, baseline="blank", tolerance=1e-6)
    with pytest.raises(AnalysisError, match="mean, blank, zero"):
        integrated_gradients(model, ids, baseline="none")  # type: ignore[arg-type]


def test_gradients_that_are_not_finite_are_said_at_once(pairs: Callable, monkeypatch) -> None:
    model = pairs("llama").model
    ids = torch.arange(5, 11)[None]
    monkeypatch.setattr(
        "headwater.analyses._inputs.inputs.Entering.slopes",
        lambda at, value, copies, forms: [
            torch.full(each.shape, torch.nan, dtype=torch.float64) for each in forms
        ],
    )
    with pytest.raises(AnalysisError, match="gradients of example 0 are not finite"):
        integrated_gradients(model, ids, baseline="mean")
