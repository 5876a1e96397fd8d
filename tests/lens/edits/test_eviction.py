"""Heavy hitters on a text of several blocks of queries, and on a text that is read piece by piece from a cache.

Seen to fail: the weakest heavy hitter never replaced, a key that comes of age one step late, sums that an earlier call
had not handed on.
"""

from __future__ import annotations

import pytest
import torch
from edit_closures import evicting
from tiny_models import tiny

import headwater as hw
from headwater.lens.edits import eviction

LENGTH = 50
IDS = torch.arange(LENGTH)[None] * 7 % 37 + 3
EDIT = hw.HeavyHitters(heavy=5, recent=6)


@pytest.fixture(autouse=True)
def blocks_of_16_queries(monkeypatch):
    monkeypatch.setattr(eviction, "ROWS", 16)


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny("llama"))


def test_the_keys_that_are_kept_are_those_of_the_loop_over_dense_weights(model):
    plain = model.record(IDS).pattern(0).double()
    with model.edit(EDIT):
        found = model.record(IDS).pattern(0).double()
    assert (found - evicting(5, 6)(plain)).abs().max() < 1e-5
    assert (plain - found).abs().max() > 1e-3


def test_more_heavy_hitters_than_keys_take_no_more_memory(model):
    plain = model.record(IDS).pattern(0)
    with model.edit(hw.HeavyHitters(heavy=2**31 - 1, recent=6)):
        assert (model.record(IDS).pattern(0) - plain).abs().max() < 1e-6


# with many, the first piece has fewer keys than there may be heavy hitters
@pytest.mark.parametrize("edit", [EDIT, hw.HeavyHitters(heavy=36, recent=6)], ids=["few", "many"])
def test_a_text_read_in_pieces_from_a_cache_keeps_what_it_keeps_at_once(model, edit):
    with model.edit(edit):
        whole = model.hf(input_ids=IDS).logits
        first = model.hf(input_ids=IDS[:, :30], use_cache=True)
        cache, pieces = first.past_key_values, [first.logits]
        for begin, end in ((30, 31), (31, LENGTH)):
            pieces.append(model.hf(input_ids=IDS[:, begin:end], past_key_values=cache).logits)
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4
