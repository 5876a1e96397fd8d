"""Guided runs (`guiding.py`): the picture moves as a loop by hand moves it, and plainly where nothing pulls.

Seen to fail with the scheduler left on the old picture, with the unconditional rows in the loss, and with the sign
turned.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_diffusers

import headwater as hw
from headwater.lens.diffusion.model import DiffusionModel
from headwater.lens.errors import EditError, ModelError

STEPS, RATE = 3, 40.0
OPTIONS = {"num_inference_steps": STEPS, "output_type": "latent", "height": 16, "width": 16}
PATH = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def pipeline():
    return tiny_diffusers.pipeline()


@pytest.fixture(scope="module")
def model(pipeline):
    return hw.load(pipeline)


def drawn(pipeline, **more):
    return pipeline("a red cat", generator=torch.Generator().manual_seed(0), **OPTIONS, **more).images


def loss(record):
    return hw.losses.overlap_loss(hw.losses.picture_maps(record.part("cross:4x4")), [[2], [3]])


class Eager:
    """A processor of diffusers in plain torch, which keeps its weights with their gradients."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        q, k, v = (
            each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for each in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        if weights.shape[2] == 16:
            self.kept.append(weights)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def by_hand(pipeline, moved_at, guidance):
    """Denoising in a loop, with eager attention to words, on plain torch and autograd."""
    unet, kept = pipeline.unet, []
    old = dict(unet.attn_processors)
    unet.set_attn_processor({n: Eager(kept) if "attn2" in n else each for n, each in old.items()})
    try:
        told, untold = pipeline.encode_prompt("a red cat", "cpu", 1, True)
        pipeline.scheduler.set_timesteps(STEPS)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for step, time in enumerate(pipeline.scheduler.timesteps):
            if step in moved_at:
                x = x.detach().requires_grad_()
                kept.clear()
                unet(x, time, encoder_hidden_states=told)
                maps = torch.stack(kept).mean((0, 2))[0]  # [patch, word]
                one, other = maps[:, 2], maps[:, 3]
                found = torch.minimum(one, other).sum() / (one + other).sum()
                x = (x - RATE * torch.autograd.grad(found, x)[0]).detach()
            with torch.no_grad():
                both = unet(torch.cat([x, x]), time, encoder_hidden_states=torch.cat([untold, told])).sample
                empty, full = both.chunk(2)
                x = pipeline.scheduler.step(empty + guidance * (full - empty), time, x).prev_sample
        return x
    finally:
        unet.set_attn_processor(old)


def test_a_guided_run_is_a_loop_by_hand(pipeline, model) -> None:
    plain = drawn(pipeline)
    with model.guiding(loss, RATE, steps=[0, 2]) as told:
        found = drawn(pipeline)
    expected = by_hand(pipeline, (0, 2), 7.5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert (found - plain).abs().max() > 1e-3
    assert sorted(told.losses) == [0, 2]
    assert torch.equal(drawn(pipeline), plain)  # nothing is left behind
    assert "step" not in vars(pipeline.scheduler)


def test_a_rate_of_nothing_moves_nothing_and_a_low_loss_is_left(pipeline, model) -> None:
    plain = drawn(pipeline)
    for settings in ({"rate": 0.0}, {"rate": RATE, "least": 1.0}):
        with model.guiding(loss, **settings) as told:
            torch.testing.assert_close(drawn(pipeline), plain, atol=1e-6, rtol=1e-6)
        assert max(told.moved.values()) == 0


def test_more_moves_lower_the_loss_before_the_next(pipeline, model) -> None:
    with model.guiding(loss, RATE, steps=[0], times=4) as told:
        drawn(pipeline)
    values = [float(each) for each in told.losses[0]]
    assert len(values) == 4
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_edits_and_records_see_the_moved_picture(pipeline, model) -> None:
    with model.guiding(loss, RATE, steps=[1]), model.record_steps(maps=[1]) as steps:
        drawn(pipeline)
    assert len(steps) == STEPS
    with model.guiding(loss, RATE, steps=[1], times=2) as told:
        drawn(pipeline)
    record = steps.record(1).part("cross:4x4")
    maps = hw.losses.picture_maps(record)[1:]  # the conditional row
    found = hw.losses.overlap_loss(maps, [[2], [3]])
    torch.testing.assert_close(found, told.losses[1][1], atol=1e-5, rtol=1e-4)
    part = model.part("cross:4x4")
    with model.guiding(loss, RATE, steps=[1]) as told, part.edit(hw.Knockout("all", [2])):
        drawn(pipeline)
    assert float(told.losses[1][0]) == 0  # a word without weights overlaps with none


def test_what_can_not_be_guided_is_refused(pipeline, model) -> None:
    with pytest.raises(EditError, match="gradient"), model.guiding(lambda record: torch.zeros(1), 1.0):
        drawn(pipeline)
    with pytest.raises(EditError, match="whole number"), model.guiding(loss, 1.0, times=0):
        pass
    for steps in ("all", 1, [-1], [], [0.5]):
        with pytest.raises(EditError, match="steps lists"), model.guiding(loss, 1.0, steps=steps):
            pass
    with pytest.raises(EditError, match="least"), model.guiding(loss, 1.0, least=float("nan")):
        pass
    with pytest.raises(EditError, match="rate of step 0"), model.guiding(loss, lambda step: None):
        drawn(pipeline)
    with pytest.raises(EditError, match="one number per picture"):  # noqa: SIM117
        with model.guiding(lambda record: loss(record).repeat(3), 1.0):
            drawn(pipeline)
    alone = cast(DiffusionModel, hw.load(tiny_diffusers.unet()))
    with pytest.raises(ModelError, match="pipeline"), alone.guiding(loss, 1.0):
        pass
