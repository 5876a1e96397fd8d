"""Laws of edits in a model: padding, nested blocks, the order of edits on other heads, and every backend alike."""

from __future__ import annotations

import tiny_models
import torch
from comparison import close_run

import headwater as hw


def test_left_padded_rows_are_edited_at_their_own_positions():
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(6)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with model.edit(hw.Redistribute([0], 0.1), hw.Knockout([-1], [2])):
        close_run(model(ids, mask)[1, 6:], model(ids[1:, 6:])[0])
        generated = model.generate(ids, 6, attention_mask=mask)
        assert generated[1, 6:].equal(model.generate(ids[1:, 6:], 6)[0])


def test_edits_on_disjoint_heads_commute():
    model = hw.load(tiny_models.tiny("gemma2"))
    ids, mask = tiny_models.batch(9)
    a, b = hw.Redistribute([0], 0.3, heads=["0.1", "1.1"]), hw.TowardIdentity(0.5, heads=["0.2", "1.3"])
    with model.edit(a, b):
        one = model(ids, mask)
    with model.edit(b, a):
        other = model(ids, mask)
    assert one.equal(other)
    with model.edit(a), model.edit(b):
        assert model(ids, mask).equal(one), "nested blocks add up"


def test_all_backends_give_the_same_edited_logits():
    model = hw.load(tiny_models.tiny("llama"))
    ids, mask = tiny_models.batch(10)
    with model.edit(hw.Redistribute([0], 0.3), hw.TowardIdentity(0.2)):
        with model.using("blocked"):
            blocked = model(ids, mask)
        with model.using("reference"):
            close_run(model(ids, mask)[mask.bool()], blocked[mask.bool()])
        with model.using("flash"):
            close_run(model(ids, mask)[mask.bool()], blocked[mask.bool()])
