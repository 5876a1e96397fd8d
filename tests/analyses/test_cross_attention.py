"""Analyses of cross-attention: over the encoder's keys with the encoder's tokens, or refused before a number.

The weights come from tests/support/part_oracle.py, dense and in float64. Seen to fail with the decoder's tokens as
labels, with the decoder's padding on the keys, and without `maps="square"`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from part_oracle import PartOracle
from scipy.special import entr

import headwater as hw
from headwater.analyses._catalogue.catalogue import catalogue
from headwater.lens.errors import AnalysisError, RecordError
from headwater.lens.loading import zoo

FAMILIES = ("t5", "bart", "whisper")
SQUARE = {
    "flow", "rollout", "attention_distance", "future_influence", "patch_distance", "sink_norms",
    "space_time", "token_importance", "value_variance",
}  # fmt: skip


def case(family: str) -> tuple[hw.Record, np.ndarray, np.ndarray]:
    """The record, the oracle's weights [batch, layer, head, query, key], and which keys are real."""
    given: dict[str, Any] = zoo.inputs(family, lengths=(11, 11) if family == "whisper" else (11, 8))
    hf, oracle = zoo.build(family), PartOracle()
    oracle.run(hf, lambda model: model(**given))
    cross = [maps[0] for path, maps in oracle.maps.items() if "EncDec" in path or "encoder_attn" in path]
    record = hw.load(zoo.build(family)).record(**given).part("cross")
    real = given.get("attention_mask", torch.ones(2, cross[0].shape[-1])).bool().numpy()
    return record, torch.stack(cross, 1).numpy(), real


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_over_the_keys_of_the_encoder(family: str) -> None:
    record, weights, real = case(family)
    keys = record.key_axis.strings
    found = hw.analyses.raw_attention(record, queries="all", layers="all", keys="all")
    np.testing.assert_allclose(found, np.where(real[:, None], weights.mean((1, 2)), np.nan), atol=1e-5)
    assert found.key_token.values.tolist() == keys
    assert found.query_token.values.tolist() == record.strings

    share = np.where(real[:, None, None], weights.mean(3), np.nan)
    sinks = hw.analyses.find_sinks(record, threshold=0.1)
    np.testing.assert_allclose(sinks.score, share, atol=1e-5)
    assert sinks.found_token.size > 0
    batch, position = sinks.found_batch.values, sinks.found_position.values
    assert sinks.found_token.values.tolist() == [keys[b][p] for b, p in zip(batch, position, strict=True)]
    act = hw.analyses.find_sinks(record, rule="act", alpha=1.2, drop_first=False)
    np.testing.assert_array_equal(act.sink, share > 1.2 / real.sum(-1)[:, None, None, None])

    assert act.sink.any()

    rate = hw.analyses.sink_rate(record, threshold=0.1, key=-1)
    last = real.sum(-1) - 1
    np.testing.assert_allclose(
        rate.received_share_per_example, [share[b, ..., last[b]] for b in (0, 1)], atol=1e-5
    )
    strength = hw.analyses.sink_strength(record, keys=[0, -1])
    summed = [weights[b][..., [0, last[b]]].sum(-1) for b in (0, 1)]
    np.testing.assert_allclose(strength.strength, summed, atol=1e-5)
    np.testing.assert_allclose(strength.even[:, 0, 0, 0], 2 / real.sum(-1), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_of_a_cross_map(family: str) -> None:
    record, weights, real = case(family)
    queries = weights.shape[3]
    pooled = hw.analyses.head_clusters(record, clusters=1, cells=2).feature.values.reshape(-1, 2, 2)
    wanted = []
    for b in (0, 1):
        count = real[b].sum()
        query_cell, key_cell = np.arange(queries) * 2 // queries, np.arange(count) * 2 // count
        rows = np.stack([weights[b][:, :, query_cell == cell].mean(2) for cell in (0, 1)], 2)[..., :count]
        wanted.append(np.stack([rows[..., key_cell == cell].sum(-1) for cell in (0, 1)], -1))
    np.testing.assert_allclose(pooled, np.mean(wanted, 0).reshape(-1, 2, 2), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_and_statistics_of_a_cross_map(family: str) -> None:
    record, weights, real = case(family)
    found = hw.analyses.reference_frames(record, spectrum=False, tau=0.15, gamma=0.2)
    for b in (0, 1):
        maps = weights[b].mean(1)[..., real[b]]  # [layer, query, key]
        share, count = maps.mean(1), real[b].sum()
        np.testing.assert_allclose(found.concentration[b], share.max(-1), atol=1e-5)
        np.testing.assert_array_equal(found.top[b], share.argmax(-1))
        np.testing.assert_array_equal(found.sinks[b], ((maps >= 0.15).mean(1) >= 0.2).sum(-1))
        entropy = entr(maps).sum(-1).mean(-1)
        np.testing.assert_allclose(found.kl_uniform[b], np.log(count) - entropy, atol=1e-5)
    told = hw.analyses.head_clusters(record, clusters=2, features="statistics")
    entropy = entr(weights).sum(-1) / np.log(real.sum(-1))[:, None, None, None]
    for name, value in (("first", weights[..., 0]), ("max", weights.max(-1)), ("entropy", entropy)):
        wanted = value.mean(3).mean(0).ravel()
        np.testing.assert_allclose(told.feature.sel(summary=name), wanted / wanted.std(), rtol=1e-4)


def test_what_has_no_meaning_in_cross_attention_is_refused() -> None:
    record, _, _ = case("bart")
    for name, entry in catalogue().items():
        if entry.inputs == "record":
            assert (entry.maps == "square") == (name in SQUARE)
    calls: list[Any] = [catalogue()[name].function for name in SQUARE]
    for call in (*calls, hw.analyses.flow_graph):
        with pytest.raises(AnalysisError, match=r"queries and keys that are the same|the whole record"):
            call(record)
    with pytest.raises(RecordError, match="'distance' is not defined in cross-attention"):
        record.statistic("distance")
    with pytest.raises(AnalysisError, match="the spectrum is of a graph whose tokens look at each other"):
        hw.analyses.reference_frames(record)
    with pytest.raises(RecordError, match="holds no residual stream"):
        hw.analyses.find_sinks(record, rule="massive")
    assert isinstance(hw.analyses.head_similarity(record), xr.DataArray)


READ: dict[str, dict[str, Any]] = {
    "raw_attention": {"layers": "all", "queries": "all"}, "sink_rate": {"threshold": 0.1, "key": -1},
    "find_sinks": {"threshold": 0.1}, "sink_strength": {}, "head_similarity": {"per_example": True},
    "reference_frames": {"spectrum": False, "tau": 0.1, "gamma": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_of_either_side_changes_nothing(family: str) -> None:
    """A text and its translation give the same numbers beside a longer pair as alone."""
    given: dict[str, Any] = zoo.inputs(family, lengths=(11, 8))
    given["decoder_attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    model = hw.load(zoo.build(family))
    alone = {name: tensor[1:, : 5 if "decoder" in name else 8] for name, tensor in given.items()}
    both, single = model.record(**given).part("cross"), model.record(**alone).part("cross")
    assert (single.map(0).shape, len(READ)) == ((1, 4, 5, 8), 6)
    for name, settings in READ.items():
        function = catalogue()[name].function
        found, wanted = (function(record, **settings) for record in (both, single))
        for variable in [None] if isinstance(wanted, xr.DataArray) else list(wanted.data_vars):
            mine, own = (x if variable is None else x[variable] for x in (found, wanted))
            if "batch" in mine.dims and mine.dtype.kind in "fib":
                cut = {dim: slice(0, own.sizes[dim]) for dim in ("query", "key") if dim in own.dims}
                np.testing.assert_allclose(
                    mine.isel(batch=1, **cut), own.isel(batch=0), atol=1e-5, err_msg=f"{name} {variable}"
                )
    for rule in ("gu", "act", "spectral"):
        scores = [hw.analyses.find_sinks(record, rule=rule).score for record in (both, single)]
        np.testing.assert_allclose(scores[0][1, ..., :8], scores[1][0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_on_each_side(family: str) -> None:
    given: dict[str, Any] = zoo.inputs(family)
    short = {name: tensor[:1, :1] if tensor.dim() == 2 else tensor[:1] for name, tensor in given.items()}
    record = hw.load(zoo.build(family)).record(**short).part("cross")
    for name, settings in READ.items():
        catalogue()[name].function(record, **settings)
    if family != "whisper":
        assert hw.analyses.raw_attention(record).item() == pytest.approx(1)
