"""The three sink rules against loops over eager float64 maps, and the list of what they find."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.analyses.sinks import _received_share
from headwater.analyses.sinks.find_sinks import find_sinks
from headwater.analyses.sinks.sink_rate import sink_rate
from headwater.lens.errors import AnalysisError


def act_by_loop(attention: np.ndarray, alpha: float) -> list[int]:
    """Detection for one causal map N × N: column sums over N - j, above alpha / N, the first one taken
    off."""
    n = len(attention)
    found = [j for j in range(n) if attention[:, j].sum() / (n - j) > alpha / n]
    return found[1:]


def test_act_matches_the_loop(pairs: Callable, batch) -> None:
    ids, mask = batch
    for name in ("gpt2", "llama"):
        pair = pairs(name)
        maps = pair.maps(ids, mask).numpy()
        found = find_sinks(pair.model.record(ids, attention_mask=mask), rule="act", alpha=1.3)
        some = 0
        for b, real in enumerate(mask.bool().numpy()):
            place = np.flatnonzero(real)
            for layer, head in np.ndindex(3, 4):
                expected = place[act_by_loop(maps[layer, b, head][np.ix_(place, place)], 1.3)]
                np.testing.assert_array_equal(np.flatnonzero(found.sink.values[b, layer, head]), expected)
                some += len(expected)
        assert some > 10  # the loop must have something to find
        assert int(found.sizes["found"]) == some


def test_act_threshold_follows_each_text(pairs: Callable, batch) -> None:
    ids, mask = batch
    record = pairs("gpt2").model.record(ids, attention_mask=mask)
    found = find_sinks(record, rule="act")
    np.testing.assert_allclose(json.loads(found.attrs["threshold"]), 5 / mask.sum(1))
    kept = find_sinks(record, rule="act", threshold=0.2, drop_first=False)
    share = find_sinks(record, rule="share", threshold=0.2, min_queries=1)
    np.testing.assert_array_equal(kept.sink, share.sink)


def test_share_counts_strictly_above(pair, batch) -> None:
    ids, mask = batch
    record = pair.model.record(ids, attention_mask=mask)
    found = find_sinks(record, threshold=0.25)
    for key in (0, 3):
        column = [row.bool().nonzero()[key, 0] for row in mask]
        one = sink_rate(record, threshold=0.25, key=key)
        picked = found.score.values[np.arange(len(ids)), :, :, column]
        np.testing.assert_allclose(picked, one.received_share_per_example, rtol=1e-6)
        heads = found.heads.values[np.arange(len(ids)), column]
        np.testing.assert_allclose(heads.mean(), one.sink_rate)
    assert np.isnan(found.score.values[0, 0, 0][~mask[0].bool().numpy()]).all()
    assert not found.sink.values.transpose(0, 3, 1, 2)[~mask.bool().numpy()].any()


@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss"])
def test_gu_is_the_share_of_the_text_cut_short(pairs: Callable, name: str, few: int, monkeypatch) -> None:
    monkeypatch.setattr(
        _received_share, "FEW", few
    )  # by one transposed pass, or from the tile of the few rows
    model = pairs(name).model
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    found = find_sinks(model.record(ids, attention_mask=mask), rule="gu", length=9, threshold=0.2)
    for row, begin in ((0, 0), (1, 6)):
        cut = find_sinks(model.record(ids[row : row + 1, begin : begin + 9]), threshold=0.2)
        np.testing.assert_allclose(found.score[row, ..., begin : begin + 9], cut.score[0], atol=2e-6)
        np.testing.assert_allclose(found.heads[row, begin : begin + 9], cut.heads[0])
        assert np.isnan(found.score[row, ..., begin + 9 :]).all()


def test_the_list_names_every_sink_once(pairs: Callable) -> None:
    record = pairs("llama").model.record(
        torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    )
    found = find_sinks(record, threshold=0.2)
    assert int(found.sizes["found"]) == int(found.sink.sum()) > 0
    index = tuple(found[f"found_{name}"].values for name in ("batch", "layer", "head", "position"))
    np.testing.assert_array_equal(found.score.values[index], found.found_score)
    listed = list(
        zip(*(found[f"found_{name}"].values.tolist() for name in ("batch", "position")), strict=True)
    )
    heads = [float(found.heads[place]) for place in listed]
    assert (np.diff(heads) <= 0).all()
    for token in dict.fromkeys(listed):
        places = [i for i, other in enumerate(listed) if other == token]
        assert places == list(range(places[0], places[-1] + 1))
        assert (np.diff(found.found_score[places]) <= 0).all()
    assert found.found_token.values[0] == record.strings[index[0][0]][index[3][0]]


def test_tokens_seen_by_few_queries_can_be_left_out(pairs: Callable) -> None:
    record = pairs("gpt2").model.record(
        torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    )
    every = find_sinks(record, threshold=0.2, min_queries=1)
    some = find_sinks(record, threshold=0.2, min_queries=4)
    assert find_sinks(record, threshold=0.2, min_queries=3).equals(find_sinks(record, threshold=0.2))
    np.testing.assert_array_equal(some.sink[..., :9], every.sink[..., :9])  # token 8 of 12 is seen by four
    assert every.sink[..., 9:].any()
    assert not some.sink[..., 9:].any()


def test_the_first_token_of_a_short_text_comes_first() -> None:
    record = hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")
    found = find_sinks(record)
    assert found.found_token.values[0] == "<bos>"
    assert (
        found.heads.isnull().values[0].tolist() == [False] * 12 + [True] * 3
    )  # 3 tokens are seen by 3 or fewer of 15
    by_self = find_sinks(record, min_queries=1)
    assert by_self.found_position.values.max() == 14


def test_pure_sink_and_uniform(pure_sink: hw.HookedModel, uniform: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    found = find_sinks(pure_sink.record(ids))
    np.testing.assert_array_equal(found.heads.fillna(0).values[0], [1.0] + [0.0] * 39)
    assert int(find_sinks(pure_sink.record(ids), rule="act").sink.sum()) == 0  # the initial one is left alone
    assert int(find_sinks(uniform.record(ids), rule="share", threshold=0.2).sink.sum()) == 0


def test_refusals(pairs: Callable) -> None:
    record = pairs("bert").model.record(torch.arange(3, 12)[None])
    with pytest.raises(AnalysisError, match="rule='sum' is unknown"):
        find_sinks(record, rule="sum")
    with pytest.raises(AnalysisError, match="record its first 4 tokens"):
        find_sinks(record, rule="gu", length=4)
    with pytest.raises(AnalysisError, match="min_queries=0"):
        find_sinks(record, min_queries=0)
    with pytest.raises(AnalysisError, match=r"threshold=-0\.1 is outside its limits"):
        find_sinks(record, threshold=-0.1)
