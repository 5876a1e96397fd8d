"""Copies of pictures, of texts with pictures and of two-sided texts, in each of which values of one head are replaced.

The oracle is a hook by hand on the value projection of the plain transformers model. Mutations seen to fail: every copy
a copy of the first pair, a run resumed one block late.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.analyses._measures.pair_scores import Asked
from headwater.analyses._prompts.pairs import pairs_of, side_by_side
from headwater.analyses._runs.prompt_copies import Copies
from headwater.analyses._runs.replace_activations import Parts, Swap
from headwater.lens.loading import zoo
from headwater.lens.models.projections import projections

LAYER, D = 1, 8


def scored(name: str, out: Any) -> Tensor:
    if name == "clip":
        return torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
    row = out.logits[:, -1] if out.logits.dim() == 3 else out.logits
    return row[:, 2] - row[:, 1]


@pytest.mark.parametrize(
    ("name", "part"),
    [("vit_classifier", "vision"), ("clip", "vision"), ("clip", "text"), ("llava", "text"), ("llava", "vision"),
     ("t5", "encoder"), ("t5", "decoder"), ("t5", "cross"), ("whisper", "encoder"), ("whisper", "cross")],
)  # fmt: skip
def test_a_head_of_any_part(name: str, part: str) -> None:
    plain = zoo.build(name)
    model = hw.load(copy.deepcopy(plain)).part(part)
    clean, corrupt = zoo.inputs(name, 1), zoo.inputs(name, 2)
    tokens = [model.to_tokens(**side) for side in (clean, corrupt)]
    (pairs,) = pairs_of(model, side_by_side(model, *tokens))
    tokenless = name in ("clip",)
    asked = Asked("logit_difference", None if tokenless else 2, None if tokenless else 1, -1)
    copies, seen = Copies.of(model, pairs, asked, "denoise", parts=[LAYER])
    source = seen.seen[LAYER]["v"][2:]

    def put(found: Parts) -> Parts:
        values = found["v"].clone()
        for row in range(2):  # head h in copy h
            values[2 * row : 2 * row + 2, row] = source[:, row]
        return {**found, "v": values}

    got = copies.measure(Swap(model, 4, attention={LAYER: put}), 2, LAYER, 0)
    module = plain.get_submodule(
        {m: path for path, m in model.hf.named_modules()}[projections(model, LAYER).value.module]
    )
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: kept.append(out.detach()))
    with torch.no_grad():
        expected = scored(name, plain(**clean))
        handle.remove()
        np.testing.assert_allclose(copies.told.clean, expected, rtol=1e-4, atol=1e-6)
        moved = 0.0
        for head in range(2):
            span = slice(head * D, head * D + D)

            def hook(_: Any, args: Any, out: Tensor, span: slice = span) -> Tensor:
                out = out.clone()
                out[..., span] = kept[0][..., span]
                return out

            handle = module.register_forward_hook(hook)
            expected = scored(name, plain(**corrupt))
            handle.remove()
            np.testing.assert_allclose(got[head], expected, rtol=1e-4, atol=1e-6)
            moved = max(moved, float((got[head] - copies.told.corrupt).abs().max()))
    assert moved > 2e-5
