"""Sink rates of natural, random and repeated tokens against single runs and closed forms.

Seen to fail: tokens drawn anew for every position under "repeated".
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater.analyses._measures.bootstrap import interval
from headwater.analyses.sinks.sink_inputs import sink_inputs
from headwater.analyses.sinks.sink_rate import sink_rate
from headwater.lens.errors import AnalysisError

HARMONIC = sum(1 / i for i in range(1, 25))


@pytest.fixture(scope="module")
def unplaced() -> hw.HookedModel:
    """A GPT-2 without positions."""
    torch.manual_seed(1)
    config = hf.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    plain = hf.GPT2LMHeadModel(config).eval()
    torch.nn.init.zeros_(plain.transformer.wpe.weight)
    return hw.load(plain)


def texts(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(0))


def test_repeated_tokens_without_positions_have_even_rows(unplaced: hw.HookedModel) -> None:
    found = sink_inputs(unplaced, texts(), threshold=0.1)
    even = found.received_share.sel(input="repeated")
    np.testing.assert_allclose(even, HARMONIC / 24, rtol=1e-5)  # every row is uniform: H_T / T
    for name in ("natural", "random"):
        assert float(abs(found.received_share.sel(input=name) - HARMONIC / 24).max()) > 0.02
    np.testing.assert_array_equal(found.rate.sel(input="repeated"), 1.0)  # 0.157 is above 0.1
    assert (sink_inputs(unplaced, texts(), threshold=0.17).rate.sel(input="repeated") == 0).all()


def test_a_sink_of_the_position_stays(pure_sink: hw.HookedModel) -> None:
    found = sink_inputs(pure_sink, texts())
    np.testing.assert_array_equal(found.rate, 1.0)
    np.testing.assert_allclose(found["mean"], 1.0)
    np.testing.assert_allclose(found.above_repeated, 0.0)


def test_natural_text_is_sink_rate_of_it(unplaced: hw.HookedModel) -> None:
    ids = texts(4, 20)
    found = sink_inputs(unplaced, ids, length=9, threshold=0.35, draws=50, batch_size=3)
    alone = [sink_rate(unplaced.record(row[None, :9]), 0.35) for row in ids]
    rates = np.array([float(one.sink_rate) for one in alone])
    np.testing.assert_allclose(found.rate.sel(input="natural"), rates)
    assert 0 < rates.mean() < 1
    columns = found.rate.transpose("batch", "input").values
    np.testing.assert_allclose(found["mean"], columns.mean(0))
    np.testing.assert_allclose(found.above_random.sel(bound="mean"), (columns[:, 0] - columns[:, 1]).mean())
    assert (found.low <= found["mean"]).all()
    paired = np.array(interval(columns[:, :1] - columns[:, 2:], 50, 0))[:, 0]
    np.testing.assert_allclose(found.above_repeated, paired)
    again = sink_inputs(unplaced, ids, length=9, threshold=0.35, draws=50, batch_size=1)
    np.testing.assert_allclose(again.rate, found.rate)
    assert found.attrs["length"] == 9
    other = sink_inputs(unplaced, ids, length=9, threshold=0.35, seed=1).received_share
    assert not np.allclose(other.sel(input="random"), found.received_share.sel(input="random"))


def test_the_start_may_stay(unplaced: hw.HookedModel) -> None:
    ids = texts()
    found = sink_inputs(unplaced, ids, keep_start=23)
    # all but the last token, which no share of the first depends on but through its own row
    given = found.received_share * 24
    close = abs(given.sel(input="random") - given.sel(input="natural")).max()
    assert 0 < float(close) <= 1


def test_refusals(unplaced: hw.HookedModel) -> None:
    with pytest.raises(AnalysisError, match="one token"):
        sink_inputs(unplaced, torch.tensor([[5]]))
    with pytest.raises(AnalysisError, match="length=1 is outside its limits"):
        sink_inputs(unplaced, texts(), length=1)
    with pytest.raises(AnalysisError, match="keep_start=24 leaves nothing"):
        sink_inputs(unplaced, texts(), keep_start=24)
