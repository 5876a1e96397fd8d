"""`MaskPairs` on models: MoBA query by query, records that are saved, cross-attention.

The tests are of `pair_masks.py` and `pair_settings.py`; the rules themselves are held to their definitions in
tests/kernels/tiles/test_pair_rules.py. Seen to fail: future blocks chosen, the own block counted beside `top`, means
with padding.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from comparison import close

import headwater as hw
from headwater.kernels.tiles.mask import Mask
from headwater.lens.edits.pair_masks import chosen_blocks
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo


def moba(q: torch.Tensor, k: torch.Tensor, size: int, top: int) -> torch.Tensor:
    """The pairs that MoBA shows, bool [query, key], query by query; one head [position, d]."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for i, query in enumerate(q):
        own = i // size
        products = [float(query @ k[n * size : (n + 1) * size].mean(0)) for n in range(own)]
        best = sorted(range(own), key=products.__getitem__)[::-1][: top - 1]
        for n in (own, *best):
            seen[i, n * size : (n + 1) * size] = True
    return seen.tril()


@pytest.mark.parametrize(("size", "top"), [(3, 1), (3, 2), (4, 3), (5, 9)])
def test_moba_keeps_the_own_block_and_the_best_of_the_earlier_ones(size, top):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 11, 6, generator=generator), torch.randn(2, 2, 11, 6, generator=generator)
    columns, first = torch.arange(11), torch.tensor([[0], [2]])
    real = (columns >= first) & (columns < torch.tensor([[11], [9]]))
    k[1, :, ~real[1]] = 100.0  # padding that would decide every mean
    mask = Mask(11, 11, right=0, valid_keys=real, valid_queries=real, start=torch.tensor([0, 2]))
    found = chosen_blocks(q, k, mask, size, top)
    for row, head in ((0, 0), (0, 3), (1, 1), (1, 2)):
        expected = moba(q[row, head, real[row]], k[row, head // 2, real[row]], size, top)
        seen = found[row, head, real[row]].repeat_interleave(size, -1)[:, : len(expected)]
        assert (seen & (torch.ones_like(expected).tril() > 0)).equal(expected)


def test_without_a_causal_mask_later_blocks_are_chosen_too_and_padding_is_in_no_mean():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 3, 11, 6, generator=generator), torch.randn(2, 3, 11, 6, generator=generator)
    real = torch.arange(11) < torch.tensor([[11], [7]])
    k[1, :, 7:] = q[1, :, :4] * 9  # padding that would be chosen
    found = chosen_blocks(q, k, Mask(11, 11, valid_keys=real), 3, 2)
    alone = chosen_blocks(q[1:, :, :7], k[1:, :, :7], Mask(7, 7), 3, 2)
    assert found[1, :, :7, :3].equal(alone[0])
    best = (q[1, :, :7] @ torch.stack([k[1, :, n : min(n + 3, 7)].mean(1) for n in (0, 3, 6)], 1).mT).argmax(
        -1
    )
    assert alone[0].gather(-1, best[..., None]).all()
    assert (alone.sum(-1) == 2).all()


def test_moba_in_a_model_hides_the_other_blocks_and_is_the_same_from_a_cache():
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(1, (13,))
    edit = hw.MaskPairs({"kind": "moba", "size": 3, "top": 2}, layers=0, heads=["0.1", "0.2"])
    plain = model.record(ids).map(0)
    with model.edit(edit):
        record = model.record(ids)
        whole = model.hf(input_ids=ids).logits
        first = model.hf(input_ids=ids[:, :7], use_cache=True)
        later = model.hf(input_ids=ids[:, 7:], past_key_values=first.past_key_values).logits
    for head in range(4):
        seen = (
            moba(plain.q[0, head], plain.k[0, head // 2], 3, 2)
            if head in (1, 2)
            else torch.ones(13, 13).tril() > 0
        )
        scores = plain.rule.scale * (plain.q[0, head] @ plain.k[0, head // 2].T)
        close(record.pattern(0, head)[0], scores.masked_fill(~seen, -torch.inf).softmax(-1))
    assert (torch.cat([first.logits, later], 1) - whole).abs().max() < 1e-4


def test_a_record_of_an_edited_run_is_saved_with_its_maps(tmp_path):
    """Every kind of rule is data: the file gives the maps back."""
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(1, (9,))
    rules = [
        {"kind": "windows", "grid": [2, 4], "size": 2, "shift": 1, "first": 1},
        {"kind": "neighbourhood", "grid": [9], "size": 3},
        {"kind": "near", "grid": [3, 3], "reach": 1},
        {"kind": "tree", "documents": [[1, 3], [3, 6], [6, 9]], "parents": [None, 0, 0]},
        {"kind": "blocks", "size": 3, "shown": [[0], [1], [0, 2]]},
        {"kind": "moba", "size": 2, "top": 2},
        torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.7,
    ]
    for edit in (*map(hw.MaskPairs, rules), hw.StreamingWindow(1, 3), hw.GroupedAttention(4, 2, 1)):
        with model.edit(edit):
            record = model.record(ids)
        record.save(tmp_path / "x.safetensors")
        read = hw.Record.open(tmp_path / "x.safetensors")
        assert read.pattern(1).equal(record.pattern(1))
        assert not read.pattern(0).equal(model.record(ids).pattern(0)), edit


def test_a_generation_under_a_rule_is_one_record_of_the_whole_text():
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(2, (6,))
    with model.edit(hw.MaskPairs({"kind": "dilated", "reach": 1, "step": 2})):
        text, record = model.generate(ids, 4, record=True)
        close(record.pattern(1), model.record(text).pattern(1))
    with (
        model.edit(hw.MaskPairs({"kind": "moba", "size": 2, "top": 2})),
        pytest.raises(hw.HeadwaterError, match="MaskPairs"),
    ):
        model.generate(ids, 4, record=True)


def test_the_grid_of_a_picture_is_known():
    model = hw.load(zoo.build("vit"))
    patches = model.parts[model.part_name].patches
    assert patches is not None
    rows, columns = patches.grid
    pixels = torch.randn(1, 3, *patches.image, generator=torch.Generator().manual_seed(0))
    plain = model.record(pixels).map(0)
    with model.edit(hw.MaskPairs({"kind": "near", "reach": 1})):
        found = model.record(pixels).pattern(0)
    place = [(n // columns, n % columns) for n in range(rows * columns)]
    close_by = [[max(abs(a - c), abs(b - d)) <= 1 for c, d in place] for a, b in place]
    seen = torch.ones(plain.shape[2:]) > 0
    seen[1:, 1:] = torch.tensor(close_by)  # the class token sees all and is seen by all
    assert not seen.all()
    scores = plain.rule.scale * (plain.q @ plain.k.mT)
    close(found, scores.masked_fill(~seen, -torch.inf).softmax(-1))
    with pytest.raises(EditError, match="near needs grid"):
        hw.load(tiny_models.tiny("llama")).edit(hw.MaskPairs({"kind": "near", "reach": 1}))


def test_cross_attention_has_no_own_place_for_a_rule():
    model = hw.load(zoo.build("t5")).part("cross")
    with pytest.raises(EditError, match="MaskPairs has no meaning in cross-attention"):
        model.edit(hw.MaskPairs({"kind": "dilated", "reach": 1, "step": 2}))
    shown = torch.tensor([[True, False, True], [False, True, True]])
    with model.edit(hw.Temperature(0.0), hw.MaskPairs(shown)):
        found = model.record(torch.tensor([[4, 5, 6]]), decoder_input_ids=torch.tensor([[0, 7]])).pattern(
            1, 2
        )[0]
    close(found, shown / 2.0)
