"""`HeadMix` on models: chosen heads alone, records that are saved, sums of rows that are told, and caches.

Its formula is held to dense attention in test_dense_meaning.py and tests/kernels/edits/test_mixing.py. Seen to fail:
heads that are not chosen mixed too, sums of rows not told.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from comparison import close

import headwater as hw
from headwater.lens.errors import EditError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def test_only_the_chosen_heads_and_rows_take_a_mixture(model):
    post = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    plain = model.record(IDS.expand(2, -1)).pattern(0)
    with model.edit(hw.HeadMix(post=post, heads=["0.1", "0.3"], rows=[1])):
        found = model.record(IDS.expand(2, -1)).pattern(0)
    expected = plain.clone()
    expected[1, [1, 3]] = torch.einsum("gh,hij->gij", post, plain[1])[[1, 3]]
    close(found, expected)


def test_a_record_is_saved_and_says_what_rows_sum_to(model, tmp_path):
    mean, double = torch.full((4, 4), 0.25), torch.eye(4) * 2
    for edit, told in (
        (hw.HeadMix(post=mean), False),
        (hw.HeadMix(pre=double, convolution=[[0.5, 0.5], [0.1, 0.2]]), False),
        (hw.HeadMix(post=double), True),
    ):
        with model.edit(edit):
            record = model.record(IDS)
        assert ("row_sums" in record.provenance) == told
        assert bool((record.statistic("row_mass") - 1).max() > 0.5) == told
        record.save(tmp_path / "x.safetensors")
        assert hw.Record.open(tmp_path / "x.safetensors").pattern(1).equal(record.pattern(1))


def test_heads_mix_in_a_generation_and_a_convolution_over_queries_needs_all_of_them(model):
    mix = hw.HeadMix(pre=torch.eye(4).roll(1, 0), post=torch.eye(4) * 0.5 + 0.125)
    with model.edit(mix):
        text, record = model.generate(IDS, 3, record=True)
        close(record.pattern(2), model.record(text).pattern(2))
    with model.edit(hw.HeadMix(convolution=[[0.2, 0.5, 0.2]])):  # over keys alone
        text, record = model.generate(IDS, 3, record=True)
        # a query sees no key ahead of it, whether or not the key is there
        close(record.pattern(2), model.record(text).pattern(2))
    with model.edit(hw.HeadMix(convolution=[[0.5], [0.5]])):
        with pytest.raises(EditError, match="needs all queries, and a cache keeps none"):
            model.generate(IDS, 3)
        assert model.generate(IDS, 3, use_cache=False).shape == (1, 10)
