"""Similarities and clusters of heads against dense float64 maps, and kinds of heads that are known.

Mutations seen to fail: the entropy of one row in the place of that of the mean; queries of a cell added instead of
averaged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

import headwater as hw
from headwater import analyses
from headwater.analyses.heads.head_clusters import pooled_maps, silhouette
from headwater.lens.errors import AnalysisError


def dense(pair, batch) -> np.ndarray:
    """[batch, layer · head, query, key] in float64, padding zero."""
    maps = pair.maps(*batch).numpy()
    return maps.swapaxes(0, 1).reshape(maps.shape[1], -1, *maps.shape[3:])


@pytest.mark.parametrize("block", [2**22, 500])
def test_cosine_of_dense_maps(pair, batch, block: int, monkeypatch) -> None:
    monkeypatch.setitem(analyses.head_similarity.__globals__, "ELEMENTS", block)
    found = analyses.head_similarity(pair.model.record(*batch), per_example=True)
    flat = dense(pair, batch).reshape(3, 12, -1)
    flat = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, flat @ flat.swapaxes(1, 2), atol=2e-6)
    assert found.sel(head="1.2", other="2.3").shape == (3,)


def test_jensen_shannon_of_dense_rows(pair, batch, monkeypatch) -> None:
    monkeypatch.setitem(analyses.head_similarity.__globals__, "ELEMENTS", 500)
    found = analyses.head_similarity(pair.model.record(*batch), by="jensen_shannon", per_example=True)
    maps = dense(pair, batch)
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


def test_cells_of_dense_maps(pair, batch) -> None:
    record = pair.model.record(*batch)
    maps = dense(pair, batch)
    found = pooled_maps(record, 3)
    expected = []
    for text, mask in enumerate(batch[1].bool().numpy()):
        own = maps[text][:, mask][:, :, mask]
        cell = np.arange(mask.sum()) * 3 // mask.sum()
        expected.append(
            [[own[:, cell == r][:, :, cell == c].sum(2).mean(1) for c in range(3)] for r in range(3)]
        )
    np.testing.assert_allclose(found, np.mean(expected, 0).transpose(2, 0, 1), atol=2e-6)


@pytest.mark.parametrize("features", ["cells", "statistics"])
@pytest.mark.parametrize("method", ["ward", "average", "kmeans"])
def test_kinds_that_are_known(uniform: hw.HookedModel, features: str, method: str) -> None:
    """Uniform heads, four that look at themselves, two that look at the token before."""
    own, before = ["0.0", "0.2", "1.1", "2.3"], ["0.1", "2.0"]
    pattern = np.tril(np.eye(24, k=-1))
    pattern[0, 0] = 1
    with uniform.edit(hw.TowardIdentity(1.0, heads=own), hw.InjectPattern(pattern, 1.0, heads=before)):
        record = uniform.record(torch.arange(3, 27).repeat(2, 1))
    found = analyses.head_clusters(record, clusters=3, features=features, method=method, cells=24)
    kinds = np.zeros((3, 4), dtype=int)
    kinds[[0, 0, 1, 2], [0, 2, 1, 3]] = 1
    kinds[[0, 2], [1, 0]] = 2
    np.testing.assert_array_equal(found.cluster, kinds)
    np.testing.assert_array_equal(found["size"], [6, 4, 2])
    assert [str(found.prototype[n].item()) for n in (0, 1, 2)] == ["0.3", "0.0", "0.1"]
    np.testing.assert_allclose(found.silhouette, 1, atol=1e-3)
    if features == "cells":
        np.testing.assert_allclose(found.pooled[1], np.eye(24), atol=1e-6)
        np.testing.assert_allclose(found.pooled[2], pattern, atol=1e-6)


def test_silhouettes_by_loop() -> None:
    points = np.random.default_rng(0).normal(size=(9, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 2, 0])
    expected = []
    for i, mine in enumerate(labels):
        others = [distance[i, labels == c].mean() for c in range(3) if c != mine]
        same = [distance[i, j] for j in range(9) if labels[j] == mine and j != i]
        a, b = np.mean(same) if same else 0.0, min(others)
        expected.append((b - a) / max(a, b) if same else 0.0)
    np.testing.assert_allclose(silhouette(distance, labels), expected)


def test_ugly_cases(pairs: Callable, one_head: hw.HookedModel) -> None:
    model = pairs("llama").model
    short = model.record(torch.tensor([[5]]))
    np.testing.assert_allclose(analyses.head_similarity(short), 1, atol=1e-6)
    for features in ("cells", "statistics"):
        found = analyses.head_clusters(short, features=features, clusters=2)
        assert found["size"].sum() == 12
    assert analyses.head_clusters(one_head.record(torch.tensor([[5, 6]])), clusters=1).cluster.shape == (2, 1)
    with pytest.raises(AnalysisError, match="clusters=13 does not fit 12 heads"):
        analyses.head_clusters(short, clusters=13)
    with pytest.raises(AnalysisError, match="features='colour'"):
        analyses.head_clusters(short, features="colour")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="by='angle'"):
        analyses.head_similarity(short, by="angle")  # type: ignore[arg-type]
