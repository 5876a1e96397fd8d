"""Faithfulness against texts blanked by hand in the eager float64 model, and a model whose answer hangs on one token.

Mutations seen to fail: insertion and deletion exchanged, the order reversed, the random order the same for each seed,
areas without the trapezoid's halves.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.faithfulness import PARTS, faithfulness
from headwater.lens.errors import AnalysisError


def read(pair, forms: Tensor, answer: int) -> np.ndarray:
    with torch.no_grad():
        return pair.twin(forms).logits[:, -1].softmax(-1)[:, answer].numpy()


def test_curves_and_scores_by_hand(pair, batch) -> None:
    ids, mask = batch
    weights = np.where(mask.bool(), np.random.default_rng(0).normal(size=ids.shape), np.nan)
    found = faithfulness(
        pair.model,
        pair.model.to_tokens(ids, mask),
        methods={"mine": weights},
        answer="w9",
        blank="w3",
        steps=4,
        draws=9,
    )
    for row, real in enumerate(mask.bool()):
        text, order = ids[row][real], np.argsort(-weights[row][real.numpy()])
        size = len(text)

        def without(count: int, keep: bool, text=text, order=order) -> Tensor:
            form = torch.full_like(text, 3) if keep else text.clone()
            picked = order[:count].copy()
            form[picked] = text[picked] if keep else 3
            return form

        counts = [round(size * part) for part in (0, 0.25, 0.5, 0.75, 1)]
        for name, keep in (("deletion", False), ("insertion", True)):
            expected = read(pair, torch.stack([without(count, keep) for count in counts]), 9)
            np.testing.assert_allclose(found[name].values[row, 0], expected, rtol=1e-3, atol=1e-6)
            area = sum((a + b) / 8 for a, b in pairwise(expected))
            assert found[f"{name}_area"].values[row, 0] == pytest.approx(area, rel=1e-3)
        tops = [int(np.ceil(size * part)) for part in PARTS]
        whole = read(pair, text[None], 9)[0]
        for name, keep in (("comprehensiveness", False), ("sufficiency", True)):
            expected = (whole - read(pair, torch.stack([without(count, keep) for count in tops]), 9)).mean()
            assert found[name].values[row, 0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_methods_have_a_random_order_beside_them(pairs: Callable) -> None:
    model = pairs("llama").model
    ids = torch.randint(3, 61, (4, 8), generator=torch.Generator().manual_seed(1))
    found = faithfulness(model, ids, methods="blank_out rollout", seed=3, draws=50)
    assert list(found.attribution.values) == ["blank_out", "rollout", "random"]
    again = faithfulness(model, ids, methods="rollout", seed=3, draws=50)
    np.testing.assert_allclose(
        again.deletion.sel(attribution="random"), found.deletion.sel(attribution="random"), atol=1e-6
    )
    other = faithfulness(model, ids, methods="rollout", seed=4, draws=50)
    assert not np.allclose(other.deletion.sel(attribution="random"), found.deletion.sel(attribution="random"))
    np.testing.assert_allclose(
        found.deletion[:, :, 0], found.insertion[:, :, -1], atol=1e-6
    )  # the whole text
    np.testing.assert_allclose(found.deletion[:, :, -1], found.insertion[:, :, 0], atol=1e-6)  # blanks alone
    assert (found.low <= found["mean"] + 1e-12).all()
    assert (found["mean"] <= found.high + 1e-12).all()
    np.testing.assert_allclose(found["mean"].sel(score="sufficiency"), found.sufficiency.mean("batch"))


def test_a_token_that_all_hangs_on(pairs: Callable) -> None:
    """s is the last token's own logit difference under attention to itself alone: no other token changes it."""
    model = pairs("gpt2").model
    ids = torch.arange(5, 13)[None]
    right, wrong = np.eye(8)[-1:], np.eye(8)[:1]
    with model.edit(hw.TowardIdentity(1.0)):
        found = faithfulness(model, ids, methods={"right": right, "wrong": wrong}, steps=8, blank="w3")
    curve = found.deletion.sel(attribution="right").values[0]
    np.testing.assert_allclose(curve[1:], curve[1], atol=1e-6)
    assert abs(curve[1] - curve[0]) > 1e-4
    late = found.deletion.sel(attribution="wrong").values[0]
    np.testing.assert_allclose(late[:-1], late[0], atol=1e-6)
    assert found.sufficiency.sel(attribution="right").values == pytest.approx(0, abs=1e-6)
    assert abs(float(found.sufficiency.sel(attribution="wrong")[0])) > 1e-4


def test_size_instead_of_sign_and_one_token(pairs: Callable) -> None:
    model = pairs("gpt2").model
    ids = torch.arange(5, 9)[None]
    signed = {"a": [[1.0, -5.0, 2.0, 3.0]]}
    size = {"a": [[1.0, 5.0, 2.0, 3.0]]}
    by_size = faithfulness(model, ids, methods=signed, absolute=True, blank="w3").deletion
    np.testing.assert_allclose(
        by_size, faithfulness(model, ids, methods=size, blank="w3").deletion, atol=1e-7
    )
    assert faithfulness(model, ids[:, :1], methods="rollout", blank="w3").deletion.shape == (1, 2, 11)
    with pytest.raises(AnalysisError, match="random is the name of the control"):
        faithfulness(model, ids, methods={"random": [[1.0] * 4]})
