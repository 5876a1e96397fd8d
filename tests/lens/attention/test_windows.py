"""Swin, Swin v2 and Donut's Swin: windows folded into the batch are one map of the grid, with shifts, masks and edits.

The oracle is the plain model: its eager weights [batch · window, head, place, place] are put on the grid one pair after
the other, by the row and column that the roll and the cut gave to each place.

Seen to fail: the roll left out, the regions of joined borders left out, the bias taken from the other side, and the
places of the patches read within windows.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification
from transformers.models.donut.configuration_donut_swin import DonutSwinConfig
from transformers.models.donut.modeling_donut_swin import DonutSwinForImageClassification

import headwater as hw
from headwater.lens.errors import ModelError

SIDE, WINDOW = 8, 4  # the grid of the first stage; the second has one window
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


SWINS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "swin": (SwinForImageClassification, SwinConfig, {}),
    "swin v2": (Swinv2ForImageClassification, Swinv2Config, {}),
    "swin v2, another window before": (
        Swinv2ForImageClassification, Swinv2Config, {"pretrained_window_sizes": [3, 2]}
    ),
    "donut": (DonutSwinForImageClassification, DonutSwinConfig, {}),
}  # fmt: skip
both = pytest.mark.parametrize("kind", ["swin", "swin v2"])


def pair(kind: str = "swin") -> tuple[Any, Any]:
    made, configured, more = SWINS[kind]
    config = configured(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=WINDOW, **more
    )  # fmt: skip
    torch.manual_seed(0)
    plain = made._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "relative" in name:
                weight.normal_()
            elif "logit_scale" in name:
                weight.add_(torch.linspace(-0.5, 0.5, len(weight))[:, None, None])
            elif weight.dim() == 2:
                weight.mul_(5)
    return hw.load(copy.deepcopy(plain)), plain


def output_of(block: Any) -> Any:
    return block.attention.o_proj if hasattr(block.attention, "o_proj") else block.attention.output.dense


def on_grid(weights: Tensor, side: int, shift: int) -> Tensor:
    """[batch · window, head, place, place] → [batch, head, position, position], one pair after the other."""
    across = side // WINDOW
    count = across * across
    found = torch.zeros(len(weights) // count, weights.shape[1], side * side, side * side)

    def position(window: int, place: int) -> int:
        row = (window // across * WINDOW + place // WINDOW + shift) % side
        column = (window % across * WINDOW + place % WINDOW + shift) % side
        return row * side + column

    for window in range(count):
        for query in range(WINDOW**2):
            for key in range(WINDOW**2):
                found[:, :, position(window, query), position(window, key)] = weights[
                    window::count, :, query, key
                ]
    return found


class Softmax(TorchFunctionMode):
    def __init__(self, change) -> None:
        self.change = change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return self.change(found) if func is F.softmax and found.dim() == 4 else found


def logits(plain) -> Tensor:
    with torch.no_grad():
        return plain(PICTURES).logits


@pytest.mark.parametrize("kind", SWINS)
def test_maps_of_all_stages_are_the_eager_weights_on_the_grid(kind) -> None:
    model, plain = pair(kind)
    torch.testing.assert_close(model(PICTURES), logits(plain), atol=1e-5, rtol=1e-4)
    seen: list[Tensor] = []
    with Softmax(lambda w: seen.append(w) or w):
        logits(plain)
    first = model.record(PICTURES)
    for layer, shift in enumerate((0, 2)):
        torch.testing.assert_close(
            first.pattern(layer), on_grid(seen[layer], SIDE, shift), atol=1e-5, rtol=1e-4
        )
    second = first.parts["vision2"]
    torch.testing.assert_close(second.pattern(0), on_grid(seen[2], 4, 0), atol=1e-5, rtol=1e-4)
    visible = (on_grid(seen[1], SIDE, 2) > 1e-30).sum(-1).double()
    found = model.record(PICTURES, statistics=("visible", "entropy"), keep=())
    torch.testing.assert_close(torch.from_numpy(found.statistic("visible").values)[:, 1].double(), visible)
    entropy = torch.special.entr(on_grid(seen[1], SIDE, 2)).sum(-1)
    torch.testing.assert_close(
        torch.from_numpy(found.statistic("entropy").values)[:, 1], entropy, atol=1e-5, rtol=1e-4
    )


@both
def test_parts_have_their_own_width_and_patches(kind) -> None:
    model, _ = pair(kind)
    first, second = (model.part(name) for name in ("vision1", "vision2"))
    assert (first.d_model, second.d_model) == (16, 32)
    assert [part.shape(0).d_head for part in (first, second)] == [8, 8]
    assert [model.parts[name].patches.grid for name in ("vision1", "vision2")] == [(8, 8), (4, 4)]


@both
def test_edits_are_hooks_by_hand(kind) -> None:
    model, plain = pair(kind)

    def uniform(weights):
        seen = (weights > 1e-30).float()
        return seen / seen.sum(-1, keepdim=True)

    with model.part("vision1").edit(hw.TowardUniform(1.0)), model.part("vision2").edit(hw.TowardUniform(1.0)):
        found = model(PICTURES)
    with Softmax(uniform):
        expected = logits(plain)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected - logits(plain)).abs().max() > 1e-3

    def without_corner(weights):
        """The first patch is hidden: in the shifted layer it is the last place but one row and column of a window."""
        calls.append(None)
        window, place = {1: (0, 0), 2: (3, 10)}.get(len(calls), (None, None))
        if window is not None:
            weights = weights.clone()
            weights[window::4, :, :, place] = 0
            weights = weights / weights.sum(-1, keepdim=True)
        return weights

    calls: list[None] = []
    with model.part("vision1").edit(hw.Knockout(queries="all", keys=0)):
        found = model(PICTURES)
    with Softmax(without_corner):
        expected = logits(plain)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    output = output_of(plain.base_model.encoder.layers[0].blocks[1])
    output.register_forward_pre_hook(lambda module, args: (F.pad(args[0][..., 8:], (8, 0)),))
    with model.part("vision1").edit(hw.ScaleHeads({"1.0": 0.0})):
        found = model(PICTURES)
    torch.testing.assert_close(found, logits(plain), atol=1e-5, rtol=1e-4)


@both
def test_gates_have_the_gradient_of_a_hook(kind) -> None:
    model, plain = pair(kind)
    gates = torch.ones(1, 2, 2, requires_grad=True)
    with model.part("vision1").gated(gates):
        model(PICTURES).pow(2).sum().backward()
    own = torch.ones(2, 2, requires_grad=True)
    for layer, block in enumerate(plain.base_model.encoder.layers[0].blocks):
        output_of(block).register_forward_pre_hook(
            lambda module, args, layer=layer: (
                (args[0].unflatten(-1, (2, 8)) * own[layer][:, None]).flatten(-2),
            )
        )
    plain(PICTURES).logits.pow(2).sum().backward()
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad[0], own.grad, atol=1e-3, rtol=1e-3)


def test_saved_maps_come_back(tmp_path) -> None:
    model, _ = pair()
    record = model.record(PICTURES)
    record.save(tmp_path / "swin")
    again = hw.Record.open(tmp_path / "swin")
    torch.testing.assert_close(again.pattern(1), record.pattern(1))


@both
def test_a_grid_that_windows_do_not_fill_is_refused(kind) -> None:
    model, _ = pair(kind)
    with pytest.raises(ModelError, match="do not fill this picture's grid of patches"):
        model.hf(torch.randn(1, 3, 40, 40), interpolate_pos_encoding=True)


def test_the_scale_of_cosine_attention_is_clamped() -> None:
    _, plain = pair("swin v2")
    with torch.no_grad():
        plain.base_model.encoder.layers[0].blocks[0].attention.self.logit_scale.add_(3)
    model = hw.load(copy.deepcopy(plain).double())
    kept: list[Tensor] = []
    first = plain.double().base_model.encoder.layers[0].blocks[0].attention.self
    hook = first.register_forward_hook(lambda _, __, out: kept.append(out[1]))
    with torch.no_grad():
        plain(PICTURES.double(), output_attentions=True)
    hook.remove()
    record = model.record(PICTURES.double())
    torch.testing.assert_close(record.pattern(0), on_grid(kept[0], SIDE, 0))


def test_a_smaller_picture_keeps_the_shift_of_swin_v2() -> None:
    model, plain = pair("swin v2")
    small = PICTURES[..., :16, :16]
    with torch.no_grad():
        for stage in (plain, model.hf):  # whose second stage then has half a window
            stage.base_model.encoder.layers[1].blocks = torch.nn.ModuleList()
        expected = plain(small, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(
            model.hf(small, interpolate_pos_encoding=True).logits, expected, atol=1e-5, rtol=1e-4
        )


@both
def test_what_follows_modules_is_refused_by_name(kind) -> None:
    model = pair(kind)[0].part("vision1")
    with pytest.raises(
        ModelError, match="folds windows into the batch, so its heads' outputs can not be followed"
    ):
        hw.analyses.norms(model, PICTURES)
    with pytest.raises(
        ModelError, match="folds windows into the batch, so TransformerLens' names are not served"
    ):
        model.run_with_cache(PICTURES)


def test_cosines_are_no_product_of_weights() -> None:
    model, _ = pair("swin v2")
    with pytest.raises(ModelError, match="are cosines of queries and keys"):
        model.weights(0)
