"""Attributions to packed patches, which have no axis of rows, against a plain float64 tower met by hooks.

Mutation seen to fail: the mean patch of all pictures together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from packed_towers import inputs, made
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.blank_out import blank_out
from headwater.analyses.tokens.input_gradient import input_gradient
from headwater.analyses.tokens.norms import norms
from headwater.analyses.tokens.value_zeroing import value_zeroing

BLOCK = "model.visual.blocks.{}"


@pytest.fixture(scope="module")
def twins() -> tuple[hw.HookedModel, Any]:
    plain = made("Qwen2VLForConditionalGeneration")
    return hw.load(copy.deepcopy(plain)), plain.double()


def one() -> dict[str, Tensor]:
    """The first text of the inputs, with its picture of 4 × 8 patches."""
    given = inputs()
    return {name: each[:32] if name == "pixel_values" else each[:1] for name, each in given.items()}


def doubled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.double() if each.is_floating_point() else each for name, each in given.items()}


def predicted(out: Any) -> Tensor:
    return out.logits[:, -1].log_softmax(-1).max(-1).values


def run(twin: Any, given: dict[str, Tensor], path: str, change: Callable[[Tensor], Tensor]) -> Any:
    """The output when `change` replaces what a module is given."""
    handle = twin.get_submodule(path).register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        return twin(**given)
    finally:
        handle.remove()


def entering(twin: Any, given: dict[str, Tensor], path: str) -> Tensor:
    kept: list[Tensor] = []
    with torch.no_grad():
        run(twin, given, path, lambda x: kept.append(x.clone()) or x)
    return kept[0]


def test_the_gradient_at_every_patch(twins: tuple[hw.HookedModel, Any]) -> None:
    model, twin = twins
    given = doubled(one())
    leaf = entering(twin, given, BLOCK.format(0)).requires_grad_()
    slope = torch.autograd.grad(predicted(run(twin, given, BLOCK.format(0), lambda _: leaf)).sum(), leaf)[0]
    found = input_gradient(model.part("vision"), model.to_tokens(**one()))
    np.testing.assert_allclose(found.values[0], slope.norm(dim=-1), rtol=2e-3, atol=1e-6)
    assert found.key_row.values[0].max() == 3


def test_a_blank_patch_is_the_mean_patch_of_its_picture(twins: tuple[hw.HookedModel, Any]) -> None:
    model, twin = twins
    given = doubled(one())
    pixels = given["pixel_values"]
    empty = entering(
        twin, {**given, "pixel_values": pixels.mean(0, keepdim=True).expand_as(pixels)}, BLOCK.format(0)
    )
    found = blank_out(model.part("vision"), model.to_tokens(**one()), signed=True)
    with torch.no_grad():
        whole = twin(**given)
        chosen = int(whole.logits[0, -1].argmax())
        score = lambda out: float(out.logits[0, -1].log_softmax(-1)[chosen])  # noqa: E731
        expected = []
        for patch in range(32):

            def change(x: Tensor, patch: int = patch) -> Tensor:
                x = x.clone()
                x[patch] = empty[patch]
                return x

            expected.append(score(whole) - score(run(twin, given, BLOCK.format(0), change)))
    np.testing.assert_allclose(found.values[0], expected, atol=1e-3 * np.abs(expected).max())


def test_blank_places_of_a_text_have_the_mean_patch_of_their_own_picture(
    twins: tuple[hw.HookedModel, Any],
) -> None:
    model, _ = twins
    given = one()
    two = {name: torch.cat([each, each]) for name, each in given.items()}
    two["pixel_values"][32:] = torch.randn(32, 96, generator=torch.Generator().manual_seed(5)) + 1
    both = blank_out(model, model.to_tokens(**two), blank="#4", signed=True)
    alone = blank_out(model, model.to_tokens(**given), blank="#4", signed=True)
    np.testing.assert_allclose(both.values[0], alone.values[0], atol=1e-5)


def test_values_of_packed_patches(twins: tuple[hw.HookedModel, Any]) -> None:
    model, twin = twins
    given, view = doubled(one()), model.part("vision")
    found = value_zeroing(view, model.to_tokens(**one()), queries="all", first_layer=0, last_layer=0)
    block = twin.get_submodule(BLOCK.format(0))

    def output() -> Tensor:
        kept: list[Tensor] = []
        handle = block.register_forward_hook(lambda _, __, out: kept.append(out))
        with torch.no_grad():
            twin(**given)
        handle.remove()
        return kept[0]

    clean, changes = output(), []
    for patch in range(32):

        def zero(_: Any, __: Any, out: Tensor, patch: int = patch) -> Tensor:
            out = out.clone()
            out[patch, 64:] = 0  # queries, keys, values of 32 features each
            return out

        handle = block.attn.qkv.register_forward_hook(zero)
        changes.append(1 - torch.cosine_similarity(clean, output(), dim=-1))
        handle.remove()
    expected = torch.stack(changes, 1)
    np.testing.assert_allclose(found.values[0], expected / expected.sum(-1, keepdim=True), atol=2e-3)
    lengths = norms(view, model.to_tokens(**one()), queries="all", stage="residual").norm
    assert lengths.shape == (1, 2, 32, 32)
