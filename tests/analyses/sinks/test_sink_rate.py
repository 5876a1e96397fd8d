"""Sink rate against shares counted on eager float64 maps, closed forms and refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.analyses.sinks.sink_rate import sink_rate
from headwater.lens.errors import AnalysisError


def dense_share(maps: Tensor, mask: Tensor, key: int, causal: bool, window: int | None) -> np.ndarray:
    """α of the key-th real token [batch, layer, head], counting by hand who sees it."""
    rows = []
    for b, real in enumerate(mask.bool()):
        place = real.nonzero()[:, 0]
        n, at = len(place), range(len(place))[key]
        first = at if causal else 0
        last = n if window is None else min(n, at + window)
        rows.append(maps[:, b, :, place, place[at]][..., first:last].sum(-1) / (last - first))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("key", [0, 2, -1])
def test_matches_shares_of_dense_maps(pair, batch, key: int) -> None:
    ids, mask = batch
    maps = pair.maps(ids, mask)
    record = pair.model.record(ids, attention_mask=mask)
    share = dense_share(maps, mask, key, pair.causal, None)
    for layer, window in windows(pair).items():
        share[:, layer] = dense_share(maps[layer : layer + 1], mask, key, pair.causal, window)[:, 0]
    found = sink_rate(record, threshold=0.2, key=key)
    np.testing.assert_allclose(found.received_share_per_example, share, atol=2e-6)
    np.testing.assert_allclose(found.received_share, share.mean(0), atol=2e-6)
    np.testing.assert_allclose(found.sink_rate, (share > 0.2).mean())
    np.testing.assert_allclose(found.rate, (share > 0.2).mean(0))
    assert found.received_share.dims == ("layer", "head")


def windows(pair) -> dict[int, int]:
    config = pair.twin.config
    if getattr(config, "sliding_window", None) is None:
        return {}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {layer: config.sliding_window for layer, kind in enumerate(kinds) if kind == "sliding_attention"}


def test_uniform_attention_is_a_harmonic_sum(uniform: hw.HookedModel) -> None:
    """α_k = (1/(T-k+1)) Σ_{i≥k} 1/i, so α_1 = H_64/64 = 0.0741 and nothing is a sink."""
    record = uniform.record(torch.randint(3, 61, (2, 64), generator=torch.Generator().manual_seed(0)))
    for key in (0, 5, 63):
        expected = sum(1 / i for i in range(key + 1, 65)) / (64 - key)
        found = sink_rate(record, key=key)
        np.testing.assert_allclose(found.received_share, expected, rtol=2e-6)
        assert float(found.sink_rate) == 0
    np.testing.assert_allclose(sink_rate(record).received_share, 0.0741, atol=5e-5)


def test_pure_sink_is_always_one(pure_sink: hw.HookedModel) -> None:
    record = pure_sink.record(torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0)))
    assert float(sink_rate(record).sink_rate) == 1
    assert float(sink_rate(record, key=1).sink_rate) == 0


def test_the_threshold_is_strict(pairs: Callable) -> None:
    """One token gives all its weight to itself: a share of exactly 1 does not exceed 1."""
    record = pairs("gpt2").model.record(torch.tensor([[5]]))
    assert float(sink_rate(record, threshold=1.0).sink_rate) == 0
    assert float(sink_rate(record, threshold=0.99).sink_rate) == 1


def test_rows_of_unit_mass_for_learned_sinks(pairs: Callable) -> None:
    pair = pairs("gpt_oss")
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(4))
    maps = pair.maps(ids)
    expected = (maps / maps.sum(-1, keepdim=True))[..., 0].sum(-1).transpose(0, 1) / 5
    found = sink_rate(pair.model.record(ids), unit_rows=True)
    np.testing.assert_allclose(found.received_share_per_example, expected, atol=2e-6)
    plain = sink_rate(pair.model.record(ids))
    assert (plain.received_share_per_example < found.received_share_per_example).all()


def test_statistics_alone_are_enough(pairs: Callable, batch) -> None:
    ids, mask = batch
    model = pairs("llama").model
    kept = model.record(ids, attention_mask=mask, statistics=("received", "visible"), keep=())
    whole = model.record(ids, attention_mask=mask)
    np.testing.assert_allclose(sink_rate(kept).received_share, sink_rate(whole).received_share, atol=1e-6)


def test_refusals(pairs: Callable) -> None:
    record = pairs("gpt2").model.record(torch.arange(3, 8)[None])
    with pytest.raises(AnalysisError, match="threshold=2"):
        sink_rate(record, threshold=2)
    with pytest.raises(AnalysisError, match="batch row 0 has 5 tokens"):
        sink_rate(record, key=5)
    with pytest.raises(AnalysisError, match="whole number"):
        sink_rate(record, key=0.5)


def test_cls_is_a_strong_sink_of_the_trained_encoder(minilm) -> None:
    tokens = minilm.model.to_tokens(["The cat sat on the mat near the door .", "Rain fell all night long ."])
    found = sink_rate(minilm.model.record(tokens), threshold=0.3)
    maps = minilm.maps(tokens.ids, tokens.mask)
    share = maps[..., 0].sum(-1).transpose(0, 1) / tokens.mask.sum(1)[:, None, None]
    np.testing.assert_allclose(found.received_share_per_example, share, atol=5e-6)
    assert found.received_share.mean("head")[1:5].min() > 0.3
