"""Clusters of heads whose kinds are known, and their features against dense float64 maps.

Mutation seen to fail: queries of a cell added instead of averaged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses.heads.head_clusters import pooled_maps, silhouette
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


def test_cells_of_dense_maps(pair, batch) -> None:
    record = pair.model.record(*batch)
    maps = pair.maps_by_head(*batch)
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


def test_one_token_one_head_and_refusals(pairs: Callable, one_head: hw.HookedModel) -> None:
    short = pairs("llama").model.record(torch.tensor([[5]]))
    for features in ("cells", "statistics"):
        found = analyses.head_clusters(short, features=features, clusters=2)
        assert found["size"].sum() == 12
    assert analyses.head_clusters(one_head.record(torch.tensor([[5, 6]])), clusters=1).cluster.shape == (2, 1)
    with pytest.raises(AnalysisError, match="clusters=13 does not fit 12 heads"):
        analyses.head_clusters(short, clusters=13)
    with pytest.raises(AnalysisError, match="features='colour'"):
        analyses.head_clusters(short, features="colour")  # type: ignore[arg-type]


def test_statistics_of_a_picture_have_distances_on_its_grid() -> None:
    record = hw.load(zoo.build("vit")).record(**zoo.inputs("vit"))
    found = analyses.head_clusters(record, clusters=2, features="statistics")
    assert found.summary.values.tolist() == ["self", "max", "entropy", "hops", "others"]
    weights = torch.stack([record.map(layer).dense() for layer in record.layers], 1).double()[..., 1:, :]
    place = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    hops = (place[:, None] - place).abs().amax(-1)
    patches = weights[..., 1:]
    mean = ((patches * hops).sum(-1) / patches.sum(-1)).mean(-1).mean(0).flatten()
    np.testing.assert_allclose(found.feature.sel(summary="hops"), mean / mean.std(correction=0), rtol=1e-4)
    others = weights[..., 0].mean(-1).mean(0).flatten()
    np.testing.assert_allclose(
        found.feature.sel(summary="others"), others / others.std(correction=0), rtol=1e-4
    )
