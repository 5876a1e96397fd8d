"""Losses over weights (`impermissible.py`, `words_in_picture.py`, `regions.py`) against loops and the code of papers,
and finite differences of a model.

Seen to fail with a mass of rows for columns, without the clamp, with the maximum of a pair for the minimum, with
foreground and background exchanged, with the wrong axis of the softmax, and with detached maps.
"""

from __future__ import annotations

import math
from inspect import unwrap
from typing import Literal

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_diffusers

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.losses.impermissible import hiding_loss, impermissible_mass

GRID, WORDS = (3, 4), 6


@pytest.fixture(scope="module")
def maps():
    torch.manual_seed(0)
    return torch.rand(2, *GRID, WORDS, dtype=torch.float64).softmax(-1)


@pytest.fixture(scope="module")
def regions():
    found = torch.zeros(2, *GRID, dtype=torch.bool)
    found[0, :2, :3] = True  # one patch is in both
    found[1, 1:, 2] = True
    return found


def test_mass_and_hiding_loss_are_the_sums_of_their_formulas() -> None:
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 4, 5, dtype=torch.float64).softmax(-1)
    tokens = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    mass = impermissible_mass(weights, tokens)
    for b in range(2):
        expected = sum(weights[b, :, :, j] for j in tokens[b].nonzero()[:, 0])
        torch.testing.assert_close(mass[b], expected)
    rows = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    kinds: tuple[Literal["mean", "max"], ...] = ("mean", "max")
    for how, join in zip(kinds, (lambda each: sum(each) / len(each), max), strict=True):
        for b, found in enumerate(hiding_loss(mass, 0.3, how, rows)):
            each = [-math.log(1 - mass[b, h, q]) for h in range(3) for q in range(4) if rows[b, q]]
            assert float(found) == pytest.approx(0.3 * join(each))


def test_a_mass_of_one_has_a_finite_loss_and_gradient() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        mass = torch.ones(1, 1, 1, dtype=dtype, requires_grad=True)
        loss = hiding_loss(mass).sum()
        (slope,) = torch.autograd.grad(loss, mass)
        assert loss.isfinite()
        assert slope.isfinite().all()


def test_the_loss_of_a_record_moves_the_weights_that_make_the_map() -> None:
    model = hw.load("tasks-4l")
    words = "Mary gave John a drink"

    def loss():
        record = model.record(words, grad=True, statistics=())
        mass = impermissible_mass(record.pattern(1), hw.losses.marked(record, "mary"))
        return hiding_loss(mass[..., -1:]).sum()

    weight = model.hf.model.layers[1].self_attn.q_proj.weight
    (slope,) = torch.autograd.grad(loss(), weight)
    place = divmod(int(slope.abs().argmax()), slope.shape[1])
    with torch.no_grad():
        before = weight[place].clone()
        ends = []
        for step in (1e-2, -1e-2):
            weight[place] = before + step
            ends.append(float(loss()))
        weight[place] = before
    assert float(slope[place]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02)
    with pytest.raises(AnalysisError, match="no token"):
        hw.losses.marked(model.record(words), "whale")


def test_words_that_no_patch_looks_at_have_a_number_and_no_slope(maps, regions) -> None:
    empty = (maps * torch.tensor([1, 0, 0, 1, 1, 1])).requires_grad_()
    lost = hw.losses.overlap_loss(empty, [[1], [2]])
    cross = empty.flatten(1, 2)[None, :, None]
    bounded = hw.losses.bounded_loss(cross, regions, [[1], [2]])
    (slope,) = torch.autograd.grad(lost.sum() + bounded.sum(), empty)
    assert lost.tolist() == [0, 0]
    assert bounded.tolist() == [2, 2]
    assert slope.isfinite().all()


def test_what_is_no_group_no_region_and_no_mark_is_refused(maps, regions) -> None:
    weights = torch.rand(1, 2, 3, 12, WORDS).softmax(-1)
    losses, marks = hw.losses, torch.tensor([[2, 0, 1, 0, 0, 0]])
    for words in ([1, 2], [[1], []], [[1], [9]], [[1], [2.0]]):
        for call in (
            lambda words=words: losses.bounded_loss(weights, regions, words),
            lambda words=words: losses.refocus_cross_loss(maps, words, regions),
            lambda words=words: losses.overlap_loss(maps, words),
        ):
            with pytest.raises(AnalysisError, match="positions of words"):
                call()
    for call, told in (
        (lambda: losses.excite_loss(maps, [8]), "below 6"),  # not the word 8 - 6
        (lambda: losses.bounded_loss(weights, regions), "self-attention"),
        (lambda: losses.refocus_self_loss(weights[0], regions[:0]), "regions are"),
        (
            lambda: unwrap(impermissible_mass)(weights[0, :1], marks),
            "bool",
        ),  # as users run it, types unchecked
        (lambda: unwrap(hiding_loss)(weights[0, ..., 0], rows=torch.ones(2, 5).bool()), "rows bool"),
        (lambda: hiding_loss(weights[0, ..., 0], float("nan")), "finite"),
    ):
        with pytest.raises(AnalysisError, match=told):
            call()


def test_overlap_and_retention_are_the_sums_of_their_formulas(maps) -> None:
    groups = [[1, 2], [3], [5]]
    parts = [(maps[..., 1] + maps[..., 2]) / 2, maps[..., 3], maps[..., 5]]

    def shared(one, other):
        cells = [(float(x), float(y)) for x, y in zip(one.flatten(), other.flatten(), strict=True)]
        return sum(min(cell) for cell in cells) / sum(map(sum, cells))

    kept = hw.losses.kept_regions(maps, groups)
    for b in range(2):
        expected = sum(shared(parts[m][b], parts[n][b]) for m, n in ((0, 1), (0, 2), (1, 2)))
        assert float(hw.losses.overlap_loss(maps, groups)[b]) == pytest.approx(expected)
        assert all(0 < int(each.sum()) < each.numel() for each in kept[b])
        expected = sum(1 - shared(part[b], kept[b, g].double()) for g, part in enumerate(parts))
        assert float(hw.losses.retention_loss(maps, groups, kept)[b]) == pytest.approx(expected)
    same = maps[..., [2, 2]]
    torch.testing.assert_close(hw.losses.overlap_loss(same, [[0], [1]]), torch.full((2,), 0.5).double())


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_excite_is_what_the_pipeline_of_diffusers_computes(maps) -> None:
    name = "StableDiffusionAttendAndExcitePipeline"
    theirs = getattr(tiny_diffusers.diffusers, name)
    for b in range(2):
        given = maps[b].float().clone()
        most = theirs._compute_max_attention_per_index(given, [2, 4])
        expected = theirs._compute_loss(most)
        found = hw.losses.excite_loss(maps[b : b + 1].float(), [2, 4])[0]
        torch.testing.assert_close(found, expected)
    with pytest.raises(AnalysisError, match="widen"):
        hw.losses.excite_loss(maps, [5])


def test_bounded_loss_is_that_of_the_released_code(regions) -> None:
    torch.manual_seed(1)
    cross = torch.rand(2, 1, 3, 12, WORDS).softmax(-1)
    self_ = torch.rand(2, 1, 3, 12, 12).softmax(-1)
    words = [[1, 5], [3, 5]]
    boxes = regions.flatten(1)
    background = boxes.sum(0) == 0
    for weights, contexts in ((cross, words), (self_, boxes)):
        front, back = [], []
        for attn in weights:  # as `_save_loss_values` and `_compute_loss_term` do
            values = [attn[:, :, :, context] for context in contexts]
            front.append(
                torch.stack([v[:, :, box].sum((1, 2, 3)) for v, box in zip(values, boxes, strict=True)], 1)
            )
            back.append(torch.stack([v[:, :, background].sum((1, 2, 3)) for v in values], 1))
        mean_front, mean_back = torch.stack(front).mean(0), torch.stack(back).mean(0)
        iou = mean_front / (mean_front + 2 * mean_back)
        found = hw.losses.bounded_loss(weights, regions, words if weights is cross else None)
        torch.testing.assert_close(found, ((1 - iou) ** 2).sum(1))
    with pytest.raises(AnalysisError, match="no patch"):
        hw.losses.bounded_loss(cross, torch.zeros_like(regions), words)


@pytest.mark.parametrize("early", [True, False])
def test_refocusing_is_that_of_the_released_code(maps, regions, early) -> None:
    words = [[1, 2], [4]]
    total = 0.0
    text = (100 * maps[0, ..., 1:-1]).softmax(-1)
    for i, group in enumerate(words):
        for word in group:
            seen = text[..., word - 1]
            inside = float(seen[regions[i]].max())
            total += (6 if inside < 0.1 else 1 if inside < 0.2 or early else 0) * (1 - inside)
            elsewhere, rest = seen.clone(), seen.clone()
            elsewhere[regions[i]] = rest[regions[i]] = 0
            most = float(elsewhere[regions[1 - i]].max())
            rest[regions[1 - i]] = 0
            total += (4 if most > 0.15 else 1 if most > 0.1 or early else 0) * most
            total += float(rest.max()) / 2
    found = hw.losses.refocus_cross_loss(maps, words, regions, early=early, smooth=False)[0]
    assert float(found) == pytest.approx(total / 2)


def test_what_leaves_a_region_is_summed_as_in_the_released_code(regions) -> None:
    torch.manual_seed(2)
    attn = torch.rand(1, 3, 12, 12).softmax(-1)
    total = 0.0
    for region in regions:  # as `loss_one_att_outside` does for one layer
        index = region.flatten().nonzero()[:, 0]
        att_box = attn[0, :, index].sum(1) / len(index)
        total += (att_box.reshape(3, *GRID) * (~region)).reshape(3, -1).sum(-1).mean()
    torch.testing.assert_close(hw.losses.refocus_self_loss(attn, regions)[0], total / 2)


def test_maps_of_a_denoiser_carry_gradients_to_its_picture() -> None:
    model = hw.load(tiny_diffusers.pixart())
    given = {name: each.clone() for name, each in model.hf.arguments.tensors.items()}
    given["hidden_states"].requires_grad_()
    record = model.record(given, grad=True, statistics=())
    maps = hw.losses.picture_maps(record.part("cross"))
    assert maps.shape == (2, 4, 4, 7)
    loss = hw.losses.overlap_loss(maps, [[1], [2]]).sum()
    (slope,) = torch.autograd.grad(loss, given["hidden_states"])
    assert float(slope.abs().max()) > 0
    with pytest.raises(AnalysisError, match="cross"):
        hw.losses.picture_maps(record)


def test_words_of_joint_attention_are_the_keys_that_are_no_patches() -> None:
    model = hw.load(tiny_diffusers.sd3())
    record = model.record(model.hf.arguments.tensors, statistics=())
    maps = hw.losses.picture_maps(record)
    weights = torch.stack([record.pattern(layer) for layer in record.layers]).mean((0, 2))
    torch.testing.assert_close(maps.flatten(1, 2), weights[:, :16, 16:])
