"""Similarities of heads against dense float64 maps, and heads that are equal or share nothing.

Mutation seen to fail: the entropy of one row in the place of that of the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from limits import lower
from scipy.spatial.distance import jensenshannon

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError


@pytest.mark.parametrize("block", [2**22, 500])
def test_cosine_of_dense_maps(pair, batch, block: int, monkeypatch) -> None:
    lower(monkeypatch, "analyses.heads.head_similarity", ELEMENTS=block)
    found = analyses.head_similarity(pair.model.record(*batch), per_example=True)
    flat = pair.maps_by_head(*batch).reshape(3, 12, -1)
    flat = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, flat @ flat.swapaxes(1, 2), atol=2e-6)
    assert found.sel(head="1.2", other="2.3").shape == (3,)


def test_jensen_shannon_of_dense_rows(pair, batch, monkeypatch) -> None:
    lower(monkeypatch, "analyses.heads.head_similarity", ELEMENTS=500)
    found = analyses.head_similarity(pair.model.record(*batch), by="jensen_shannon", per_example=True)
    maps = pair.maps_by_head(*batch)
    for text, one, other in ((0, 0, 5), (1, 3, 11), (2, 7, 7)):
        rows = [
            jensenshannon(a / a.sum(), b / b.sum()) ** 2
            for a, b in zip(maps[text, one], maps[text, other], strict=True)
            if a.sum() > 0
        ]
        assert float(found[text, one, other]) == pytest.approx(1 - np.mean(rows) / np.log(2), abs=3e-6)


def test_equal_and_disjoint_heads(uniform: hw.HookedModel, pure_sink: hw.HookedModel) -> None:
    """All heads alike: 1 everywhere. Uniform against a sink: (1/i)-rows against one column, in closed form."""
    ids = torch.arange(3, 13)[None]
    for by in ("cosine", "jensen_shannon"):
        np.testing.assert_allclose(analyses.head_similarity(uniform.record(ids), by=by), 1, atol=1e-6)
    model = pure_sink
    with model.edit(hw.TowardUniform(1.0, heads=["0.1"])):
        found = analyses.head_similarity(model.record(ids))
        shared = analyses.head_similarity(model.record(ids), by="jensen_shannon")
    harmonic = (1 / np.arange(1, 11)).sum()
    assert float(found.sel(head="0.1", other="2.0")) == pytest.approx(harmonic / np.sqrt(harmonic * 10))
    apart = [jensenshannon(np.eye(i)[0], np.full(i, 1 / i)) ** 2 if i > 1 else 0.0 for i in range(1, 11)]
    assert float(shared.sel(head="0.1", other="2.0")) == pytest.approx(
        1 - np.mean(apart) / np.log(2), abs=1e-6
    )


def test_one_token_and_an_unknown_similarity(pairs: Callable) -> None:
    short = pairs("llama").model.record(torch.tensor([[5]]))
    np.testing.assert_allclose(analyses.head_similarity(short), 1, atol=1e-6)
    with pytest.raises(AnalysisError, match="by='angle'"):
        analyses.head_similarity(short, by="angle")  # type: ignore[arg-type]
