"""Signals taken out and added, against closed forms: what a local change does to a score is a product of two vectors.

Mutations seen to fail: the scale of the norm left out of the local change, the sign of ablation, controls drawn from
the used slices.
"""

from __future__ import annotations

import numpy as np
import planted_models
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses._streams.score_slices import Forms, used
from headwater.lens.errors import AnalysisError

IDS = torch.tensor([[3, 9, 17, 5, 22, 9, 40, 8]])


def repeated() -> torch.Tensor:
    words = torch.randperm(39, generator=torch.Generator().manual_seed(0))[:10] + 1
    return torch.cat([torch.zeros(1, dtype=torch.long), words, words[:4]])[None]


def test_a_local_change_moves_the_score_by_its_product_with_the_other_side(pairs) -> None:
    """Δs = ∓ (signal/scale · W_K + 0)·q / √d_head, in GPT-2; nothing but the reader reads it."""
    model = pairs("gpt2").model
    forms = Forms(model, [IDS[:1]])
    prompt = forms.run(IDS[:1])
    form, slices = forms.layers[2], forms.layers[2].slices(1, 7, 4)
    x = prompt.x[2]
    chosen = used(slices.terms(x[7], x[4]), 1.0)
    y = prompt.said[forms.wiring.number["0.3"], 4]
    y = torch.nn.functional.pad(y - y.mean(), (0, 1))
    axes = slices.right[chosen]
    signal = (axes.T @ (axes @ y))[:-1]
    signal = signal - signal.mean()
    q = x[7] @ form.query[1]
    expected = float((signal / prompt.scale[2][4]) @ form.key[1, :-1] @ q) / 8**0.5
    for how, sign in (("ablate", -1), ("boost", 1)):
        found = analyses.signal_interventions(
            model, IDS, reader="2.1", sender="0.3", side="k", how=how, where="local", source=4, factor=0.5
        )
        assert float(found.score_change[0]) == pytest.approx(0.5 * sign * expected, rel=1e-3, abs=1e-6)
        assert int(found.slices[0]) == len(chosen)
        after = y[:-1] + 0.5 * sign * signal
        assert float(found.norm_ratio[0]) == pytest.approx(float(after.norm() / y.norm()), rel=1e-6)
    # where all slices but one are used, one is left to draw
    assert (found.change_random != 0).any()


def test_without_its_signal_the_planted_head_does_not_look_there() -> None:
    model = hw.load(planted_models.induction(vocabulary=40, positions=64).model)
    ids = repeated()
    settings = {"reader": "1.2", "sender": "0.1", "answer": [int(ids[0, 5])]}
    found = analyses.signal_interventions(model, ids, **settings)
    assert int(found.key[0]) == 5
    assert float(found.weight[0]) == pytest.approx(1.0)
    assert float(found.score_change[0]) < -50  # of 60
    assert float(found.change[0]) < -1
    # of 60: a global change also moves the length that the norm divides by
    np.testing.assert_allclose(found.score_change_random, 0, atol=0.5)
    np.testing.assert_allclose(found.change_random, 0, atol=0.1)  # the change of its signal is beyond 1
    # the stream is [u, -u] and the reader reads u alone: half of the output's square is the signal
    assert float(found.cosine[0]) == pytest.approx(0.5**0.5, rel=1e-2)
    more = analyses.signal_interventions(model, ids, how="boost", where="local", **settings)
    assert float(more.score_change[0]) > 50


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_every_architecture_and_nothing_at_factor_zero(pairs, name: str) -> None:
    model = pairs(name).model
    found = analyses.signal_interventions(model, IDS, side="q", factor=0.0, draws=2)
    # runs of other batch sizes may be rounded differently
    np.testing.assert_allclose(found.change, 0, atol=1e-5)
    np.testing.assert_allclose(found.score_change_random, 0, atol=1e-5)
    found = analyses.signal_interventions(model, IDS, side="q", where="local", draws=2)
    assert found.score_change.item() != 0


def test_what_can_not_be_changed_is_refused(pairs) -> None:
    with pytest.raises(AnalysisError, match="share keys"):
        analyses.signal_interventions(pairs("llama").model, IDS, where="local")
    model = pairs("gpt2").model
    with pytest.raises(AnalysisError, match=r"no head speaks before 0\.1"):
        analyses.signal_interventions(model, IDS, reader="0.1")
    with pytest.raises(AnalysisError, match="has no key but the first token"):
        analyses.signal_interventions(model, IDS[:, :1])
    with pytest.raises(AnalysisError, match="how='remove' is unknown"):
        analyses.signal_interventions(model, IDS, how="remove")  # type: ignore[arg-type]
