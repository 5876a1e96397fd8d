"""FAI and WAAD against loops over eager float64 maps, closed forms and refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from limits import block_elements

import headwater as hw
from headwater.analyses.tokens.future_influence import future_influence
from headwater.lens.errors import AnalysisError


def by_loop(
    maps: np.ndarray, chosen: np.ndarray, low: int, high: int, window: int
) -> tuple[list[float], list[float]]:
    """FAI per key and WAAD per query of one text; maps [layer, head, query, key], chosen (local, global)."""
    local, far = (maps[pick].mean(0) for pick in chosen)
    n = maps.shape[-1]
    influence = []
    for s in range(n):
        later = [far[t, s] for t in range(s + low, min(n - 1, s + high) + 1)]
        influence.append(np.mean(later) if later else np.nan)
    return influence, [sum(local[t, s] * min(t - s, window) for s in range(t + 1)) for t in range(n)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_matches_the_loops(causal_pair, side: str) -> None:
    generator = torch.Generator().manual_seed(4)
    ids, mask = torch.randint(3, 61, (2, 30), generator=generator), torch.ones(2, 30, dtype=torch.long)
    mask[1, 22:] = 0
    mask = mask if side == "right" else mask.flip(1)
    maps = causal_pair.maps(ids, mask).numpy()
    record = causal_pair.model.record(ids, attention_mask=mask)
    found = future_influence(record, share=0.25, ahead_from=3, ahead_to=7, window=4)

    real = mask.bool().numpy()
    far = np.abs(np.subtract.outer(np.arange(30), np.arange(30)))
    per_row = (maps * far).sum(-1) / np.where(maps.sum(-1) > 0, maps.sum(-1), np.nan)
    order = np.argsort(np.nanmean(np.nanmean(per_row, -1), 1), axis=None)  # [layer, head] after the batch
    picks = []
    for name, index in (("local", order[:3]), ("global", order[-3:])):
        pick = np.zeros(12, dtype=bool)
        pick[index] = True
        picks.append(pick.reshape(3, 4))
        np.testing.assert_array_equal(found[name], picks[-1])
    for row in range(2):
        place = np.flatnonzero(real[row])
        dense = maps[:, row][:, :, place[:, None], place]
        influence, windowed = by_loop(dense, np.array(picks), 3, 7, 4)
        np.testing.assert_allclose(found.future_influence.values[row, place], influence, atol=2e-6)
        np.testing.assert_allclose(found.windowed_distance.values[row, place], windowed, atol=2e-5)
        assert np.isnan(found.future_influence.values[row, ~real[row]]).all()
        assert np.isnan(found.windowed_distance.values[row, ~real[row]]).all()


def test_bands_join_over_blocks_of_rows(uniform: hw.HookedModel) -> None:
    """Uniform rows of 1/(t+1): the mean over later tokens and the clipped distance have closed forms."""
    record = uniform.record(torch.randint(3, 61, (1, 64), generator=torch.Generator().manual_seed(0)))
    with block_elements(1):
        found = future_influence(record, ahead_from=10, ahead_to=20, window=10)
    for s in range(54):
        expected = np.mean([1 / (t + 1) for t in range(s + 10, min(63, s + 20) + 1)])
        assert float(found.future_influence[0, s]) == pytest.approx(expected, rel=1e-5)
    assert np.isnan(found.future_influence[0, 54:]).all()
    for t in range(64):
        expected = sum(min(back, 10) for back in range(t + 1)) / (t + 1)
        assert float(found.windowed_distance[0, t]) == pytest.approx(expected, rel=1e-5)


def test_pure_sink(pure_sink: hw.HookedModel) -> None:
    record = pure_sink.record(torch.randint(3, 61, (1, 40), generator=torch.Generator().manual_seed(0)))
    found = future_influence(record)
    np.testing.assert_allclose(found.future_influence[0, :30], [1] + [0] * 29, atol=1e-6)
    np.testing.assert_allclose(found.windowed_distance[0], np.minimum(np.arange(40), 10), atol=1e-4)


def test_ugly_cases(pairs: Callable) -> None:
    short = future_influence(pairs("gpt2").model.record(torch.tensor([[5]])))
    assert np.isnan(short.future_influence).all()
    np.testing.assert_allclose(short.windowed_distance, 0, atol=1e-6)
    with pytest.raises(AnalysisError, match="not causal"):
        future_influence(pairs("bert").model.record(torch.arange(3, 9)[None]))
    record = pairs("gpt2").model.record(torch.arange(3, 9)[None])
    for settings, message in (
        ({"share": 0.7}, "share=0.7"),
        ({"ahead_from": 20, "ahead_to": 5}, "ahead_from=20"),
        ({"window": 0}, "window=0"),
    ):
        with pytest.raises(AnalysisError, match=message):
            future_influence(record, **settings)


def test_sets_of_boundaries_and_anchors(pairs: Callable) -> None:
    """The largest values of each text by sorting; padding and tokens without a value are in neither."""
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(20) < torch.tensor([[20], [13]])).long()
    found = future_influence(pairs("llama").model.record(ids, mask), ahead_from=3, ahead_to=8, marked=0.3)
    for row, length in enumerate((20, 13)):
        waad = found.windowed_distance.values[row, :length]
        steps = np.abs(np.diff(waad))
        wanted = set(np.argsort(-steps, kind="stable")[: round(0.3 * (length - 1))].tolist())
        assert set(np.flatnonzero(found.boundary[row])) == wanted
        fai = found.future_influence.values[row, : length - 3]
        wanted = set(np.argsort(-fai, kind="stable")[: round(0.3 * (length - 3))].tolist())
        assert set(np.flatnonzero(found.anchor[row])) == wanted
