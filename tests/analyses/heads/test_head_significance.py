"""A planted head is the only significant one; the bootstrap and the corrections against their definitions.

Mutations seen to fail: Holm's factors from the largest p; the bootstrap not centred.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses._measures.bootstrap import corrected_p
from headwater.analyses.heads.head_significance import paired_bootstrap
from headwater.lens.errors import AnalysisError


def test_significance_of_a_planted_head(uniform: hw.HookedModel) -> None:
    """A loss that one head alone moves: nothing else is significant, and a constant effect has the smallest p."""
    ids = torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(1))

    def loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 0] * 0 + uniform.head_outputs(tokens)[:, 1, 2, -1].square().sum(-1)

    found = analyses.head_significance(uniform, ids, loss=loss, draws=2000)
    assert found.significant.sum() == 1
    assert bool(found.significant[1, 2])
    assert float(found.p[1, 2]) == pytest.approx(1 / 2001)
    assert (found.p.values.ravel()[np.arange(12) != 6] == 1).all()
    assert (found.low <= found.effect).all()
    with pytest.raises(AnalysisError, match=r"draws=150 can not reach level=0\.01 for 12 heads; give 1201"):
        analyses.head_significance(uniform, ids, draws=150)
    with pytest.raises(AnalysisError, match="two or more"):
        analyses.head_significance(uniform, ids[:1], loss=loss)


def test_paired_bootstrap_against_all_redrawings() -> None:
    """Three examples have 27 redrawings; the p of many draws goes to the share among these."""
    values = np.array([[0.5, 1.0], [0.2, -1.5], [1.0, 0.7]])
    effect = values.mean(0)
    every = np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1).T
    means = (values - effect)[every].mean(1)
    expected = (np.abs(means) >= np.abs(effect) - 1e-12).mean(0)
    np.testing.assert_allclose(paired_bootstrap(values, 20_000, 1), expected, atol=0.012)


def test_corrections_against_their_procedures() -> None:
    """Rejections at every level, by the step-down and step-up rules as their papers put them."""
    p = np.array([0.012, 0.3, 0.004, 0.03, 0.011, 0.012])
    ordered = np.sort(p)
    for level in (0.01, 0.024, 0.04, 0.05, 0.07, 0.5):
        down = 0
        while down < 6 and ordered[down] * (6 - down) < level:
            down += 1
        up = max((k for k in range(1, 7) if ordered[k - 1] < level * k / 6), default=0)
        assert (corrected_p(p, "holm") < level).sum() == down
        assert (corrected_p(p, "benjamini_hochberg") < level).sum() == up
    assert (corrected_p(p, None) == p).all()
