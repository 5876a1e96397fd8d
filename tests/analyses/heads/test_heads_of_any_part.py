"""Head analyses on pictures, sound and two-sided texts, on each part of a model, against gates by hand.

Mutations seen to fail: every run begun at the last layer, the slopes of one example given to the next.
"""

from __future__ import annotations

import any_input
import numpy as np
import pytest
import torch

from headwater import analyses


@pytest.fixture(scope="module", params=any_input.PARTS, ids="-".join)
def case(request: pytest.FixtureRequest) -> any_input.Case:
    return any_input.case(*request.param)


def test_importance_by_gradient(case: any_input.Case) -> None:
    slopes = []
    for one in case.each:
        gates = torch.ones(case.model.n_layers, case.model.n_heads, dtype=torch.float64, requires_grad=True)
        with case.gated(gates):
            slopes.append(torch.autograd.grad(case.score(case.plain(**one)).sum(), gates)[0])
    expected = torch.stack(slopes).abs()
    assert expected.max() > 1e-6
    found = analyses.head_importance(case.model, case.tokens, loss=case.loss, per_example=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_importance_by_ablation(case: any_input.Case) -> None:
    layers, heads = case.model.n_layers, case.model.n_heads
    expected = np.zeros((2, layers, heads))
    with torch.no_grad():
        for row, one in enumerate(case.each):
            base = case.score(case.plain(**one))
            for layer, head in np.ndindex(layers, heads):
                gates = torch.ones(layers, heads, dtype=torch.float64)
                gates[layer, head] = 0
                with case.gated(gates):
                    expected[row, layer, head] = float(case.score(case.plain(**one)) - base)
    found = analyses.head_importance(
        case.model, case.tokens, how="ablation", loss=case.loss, per_example=True, batch_size=2
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_offsets_are_trained_on_every_part(case: any_input.Case) -> None:
    """The losses before and after are those of the plain model without and with the vectors added."""
    found = analyses.fit_offsets(case.model, case.tokens, "1.0 1.2", loss=case.loss, steps=4, rate=0.1)
    offsets = torch.from_numpy(found.offset.values).double()
    with torch.no_grad():
        before = np.mean([float(case.score(case.plain(**one))) for one in case.each])
        with case.changed(lambda place, z: z + offsets[place]):
            after = np.mean([float(case.score(case.plain(**one))) for one in case.each])
    np.testing.assert_allclose([found.loss_before, found.loss_after], [before, after], rtol=1e-5)
    assert after < before
    with case.model.edit(analyses.offsets_edit(found)):
        edited = analyses.localize_heads(case.model, case.tokens, loss=case.loss, steps=1).loss_before
    np.testing.assert_allclose(edited, after, rtol=1e-5)


def test_gates_are_learned_on_every_part(case: any_input.Case) -> None:
    found = analyses.learn_gates(case.model, case.tokens, loss=case.loss, steps=2)
    gates = torch.from_numpy(found.gate.values).double()
    with torch.no_grad(), case.gated(gates):
        expected = np.mean([float(case.score(case.plain(**one))) for one in case.each])
    np.testing.assert_allclose(found.loss_gated, expected, rtol=1e-5)
