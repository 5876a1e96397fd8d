"""Branches of a batch: by the copies of latents in it, by classes, and one by one, in diffusers' own pipelines."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers

import headwater as hw
from headwater.lens.diffusion.branches import branches_of, runs_one_by_one

KINDS: Any = diffusers
ONE, THREE = torch.randn(1, 4, 2, 2), torch.randn(3, 4, 2, 2)


@pytest.mark.parametrize(
    ("about", "sample", "expected"),
    [
        ({"do_classifier_free_guidance": True}, torch.cat([ONE] * 2), ("unconditional", "conditional")),
        ({"do_classifier_free_guidance": True}, THREE, ("conditional",)),
        ({"do_classifier_free_guidance": False}, torch.cat([ONE] * 2), ("conditional",)),
        ({}, torch.cat([THREE] * 2), ("unconditional", "conditional")),
        ({}, ONE, ("conditional",)),
        (
            {"do_classifier_free_guidance": True, "do_perturbed_attention_guidance": True},
            torch.cat([THREE] * 3),
            ("unconditional", "conditional", "perturbed"),
        ),
        (
            {"do_classifier_free_guidance": False, "do_perturbed_attention_guidance": True},
            torch.cat([ONE] * 2),
            ("conditional", "perturbed"),
        ),
    ],
)
def test_copies_of_latents_tell_branches(about, sample, expected):
    assert branches_of(SimpleNamespace(**about), nn.Identity(), {"sample": sample}) == expected


def test_another_order_is_asked_for():
    pipeline = SimpleNamespace(do_classifier_free_guidance=True, image_guidance_scale=1.5)
    with pytest.raises(hw.HeadwaterError, match="branches of its own"):
        branches_of(pipeline, nn.Identity(), {"sample": torch.cat([ONE] * 3)})


def test_pipelines_that_run_branches_one_by_one_are_known_by_their_code():
    one = KINDS.FluxPipeline, KINDS.WanPipeline, KINDS.QwenImagePipeline
    both = KINDS.StableDiffusionPipeline, KINDS.StableDiffusion3Pipeline, KINDS.CogVideoXPipeline
    assert all(runs_one_by_one(object.__new__(kind)) for kind in one)
    assert not any(runs_one_by_one(object.__new__(kind)) for kind in both)
    assert not runs_one_by_one(None)
