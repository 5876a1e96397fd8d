"""A run that begins behind the first positions, with keys and values of an earlier run, is the whole run's end.

Mutation seen to fail: copies laid out prompt by prompt.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.running import prefix_cache


@pytest.mark.parametrize("name", tiny_models.CAUSAL)
def test_copies_that_begin_in_the_middle_give_the_end_of_the_whole(name):
    hf = tiny_models.tiny(name)
    model = hw.load(hf)
    ids, _ = tiny_models.batch(3, (9, 9))
    cache = prefix_cache.empty(model)
    with torch.no_grad():
        whole = hf(ids, past_key_values=cache).logits
    known = prefix_cache.filled(cache, 2, 9)
    assert len(known) == tiny_models.LAYERS
    copies = ids.repeat(3, 1)  # copy c of prompt b is row c·prompts + b
    places = torch.arange(4, 9).expand(6, -1)
    with torch.no_grad():
        found = hf(copies[:, 4:], past_key_values=prefix_cache.before(known, 4), position_ids=places).logits
    torch.testing.assert_close(found, whole[:, 4:].repeat(3, 1, 1), atol=1e-4, rtol=1e-4)


def test_a_cache_that_does_not_hold_every_position_is_none():
    assert prefix_cache.empty(hw.load(tiny_models.tiny("bert"))) is None
    cache = prefix_cache.empty(hw.load(tiny_models.tiny("gpt2")))
    assert list(prefix_cache.filled(cache, 2, 9)) == []
    assert list(prefix_cache.filled(None, 2, 9)) == []
