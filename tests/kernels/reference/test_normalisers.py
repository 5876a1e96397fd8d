"""Each normaliser of the reference on one row of three scores, one hidden, against its formula in plain Python.

Mutations seen to fail here: cog without its sign, softplus without its 1e-8, elu without its 1.
"""

from __future__ import annotations

import math

import pytest
import torch

from headwater.kernels.reference.normalisers import products, weights

SCORES = [1.5, -0.5]
E = [math.exp(s) for s in SCORES]
SIGMOID = [1 / (1 + math.exp(-(s - 1.0))) for s in SCORES]
SOFTPLUS = [math.log1p(e) for e in E]
ELU = [1.5 + 1, math.exp(-0.5)]
SIZES = [math.exp(abs(s)) for s in SCORES]
EXPECTED = {
    "softmax": [e / sum(E) for e in E],
    "softmax1": [e / (1 + sum(E)) for e in E],
    "sigmoid": SIGMOID,
    "sigmoid_normalised": [s / sum(SIGMOID) for s in SIGMOID],
    "cog": [math.copysign(s / sum(SIZES), score) for s, score in zip(SIZES, SCORES, strict=True)],
    "softplus": [s / (sum(SOFTPLUS) + 1e-8) for s in SOFTPLUS],
    "elu1": [s / sum(ELU) for s in ELU],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_row_by_its_formula(kind):
    scores = torch.tensor([*SCORES, -torch.inf]).double()[None, None, None]
    found, _ = weights(scores, None, kind, bias=-1.0, features=None, normalise=True)
    assert found[0, 0, 0].tolist() == pytest.approx([*EXPECTED[kind], 0.0], rel=1e-12, abs=0)


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_row_that_sees_nothing_has_no_weights(kind):
    scores = torch.full((1, 1, 1, 3), -torch.inf).double()
    found, log_z = weights(scores, None, kind, bias=-1.0, features=None, normalise=True)
    assert (found == 0).all()
    assert (log_z == -torch.inf).all()


def test_lssa_scores_know_directions_and_how_many_keys_are_seen():
    q, k = torch.tensor([[3.0, 0, 0, 0]]).double(), torch.tensor([[0.1, 0, 0, 0], [0, 5, 0, 0]]).double()
    seen = torch.tensor([[True, True]])
    q, k, seen = (x[None, None] for x in (q, k, seen))
    assert products(q, k, "lssa", None, 1.0, seen)[0, 0, 0].tolist() == pytest.approx(
        [math.log(4) * math.log(2), 0]
    )
