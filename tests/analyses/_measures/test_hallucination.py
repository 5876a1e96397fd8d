"""CHAIR and POPE against counts written out, and their intervals against known laws."""

from __future__ import annotations

import numpy as np
import pytest

import headwater as hw
from headwater.lens.errors import AnalysisError


def drawn(count=60, seed=0):
    rng = np.random.default_rng(seed)
    present = [set(rng.choice(8, rng.integers(1, 4), replace=False).tolist()) for _ in range(count)]
    named = [rng.choice(8, rng.integers(0, 5)).tolist() for _ in range(count)]
    return named, present


def test_chair_counts_what_is_not_there():
    named, present = drawn()
    found = hw.analyses.chair(named, present).value
    mentions = [(thing, there) for caption, there in zip(named, present, strict=True) for thing in caption]
    wrong = [thing not in there for thing, there in mentions]
    some = [any(t not in there for t in caption) for caption, there in zip(named, present, strict=True)]
    seen = sum(len({t for t in caption if t in there}) for caption, there in zip(named, present, strict=True))
    assert float(found.sel(measure="chair_i")) == pytest.approx(np.mean(wrong))
    assert float(found.sel(measure="chair_s")) == pytest.approx(np.mean(some))
    assert float(found.sel(measure="recall")) == pytest.approx(seen / sum(map(len, present)))
    assert float(found.sel(measure="things")) == pytest.approx(len(mentions) / len(named))


def test_pope_is_the_table_of_yes_and_no():
    rng = np.random.default_rng(1)
    said, right = rng.random(80) < 0.6, rng.random(80) < 0.5
    texts = [" Yes, there is." if yes else "No." for yes in said]
    found = hw.analyses.pope(texts, right.tolist()).value
    hits = (said & right).sum()
    expected = {
        "accuracy": (said == right).mean(), "precision": hits / said.sum(), "recall": hits / right.sum(),
        "f1": 2 / (said.sum() / hits + right.sum() / hits), "yes_rate": said.mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert float(found.sel(measure=name)) == pytest.approx(value)


def test_intervals_are_as_wide_as_a_share_asks_for_and_changes_are_paired():
    named, present = drawn(400)
    found = hw.analyses.chair(named, present, before=named)
    share = float(found.value.sel(measure="chair_s"))
    width = float((found.high - found.low).sel(measure="chair_s"))
    assert width == pytest.approx(2 * 1.96 * (share * (1 - share) / 400) ** 0.5, rel=0.15)
    assert (found.change == 0).all()
    assert (found.change_high - found.change_low == 0).all()  # the same captions: no doubt about the change
    none = hw.analyses.chair([[] for _ in named], present, before=named)
    assert np.isnan(none.value.sel(measure="chair_i"))
    assert float(none.change_high.sel(measure="chair_s")) < 0


def test_lists_of_different_length_are_refused():
    with pytest.raises(AnalysisError, match="1 captions for 2"):
        hw.analyses.chair([["cat"]], [{"cat"}, {"dog"}])
    with pytest.raises(AnalysisError, match="0 answers for 0"):
        hw.analyses.pope([], [])
