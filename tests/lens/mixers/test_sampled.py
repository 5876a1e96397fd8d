"""Deformable attention of Deformable DETR and RT-DETR: maps held to transformers' own `MultiScaleDeformableAttention`.

The weights of a row are the slope of what transformers' module gives by the values that it was given.

Seen to fail: x and y of a point exchanged, levels in another order, rows and columns of a name exchanged, an encoder's
queries named as object queries, a module that gives something else let through.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from small_families import made
from torch import Tensor

import headwater as hw
from headwater.lens.errors import HeadError, ModelError
from headwater.lens.mixers.sampled import reading

BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
DEFORMABLE = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "num_queries": 5, "num_labels": 3, "num_feature_levels": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "backbone_config": BACKBONE,
}  # fmt: skip
RT = {
    "d_model": 16, "encoder_hidden_dim": 16, "encoder_in_channels": [16, 24, 32], "encoder_layers": 1, "num_queries": 6,
    "encoder_ffn_dim": 16, "encoder_attention_heads": 4, "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_n_points": 2, "num_denoising": 0,
    "backbone_config": BACKBONE | {"model_type": "rt_detr_resnet"},
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "three levels": ("DeformableDetrForObjectDetection", DEFORMABLE),
    "one head, one level": (
        "DeformableDetrForObjectDetection",
        DEFORMABLE
        | {"num_feature_levels": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
        | {"backbone_config": BACKBONE | {"out_features": ["stage4"]}},
    ),
    "RT-DETR": ("RTDetrForObjectDetection", RT),
}  # fmt: skip
PICTURES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@functools.cache
def models(case: str) -> tuple[hw.HookedModel, Any]:
    """The open model and the plain one; new ones look at fixed places, so their offsets are drawn here."""
    plain = made(*CASES[case])
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                weight.normal_(std=0.5)
    return hw.load(copy.deepcopy(plain)), plain


def sampled(plain: Any, given: dict[str, Tensor]) -> dict[str, tuple[Any, dict[str, Any], Tensor]]:
    """transformers' module inside of each, its arguments and what it gave, from hooks by hand."""
    found: dict[str, tuple[Any, dict[str, Any], Tensor]] = {}
    handles = []
    for path, module in plain.named_modules():
        if type(module).__name__ == "MultiScaleDeformableAttention":

            def keep(module: Any, args: Any, output: Tensor, path: str = path) -> None:
                names = inspect.signature(type(module).forward).bind(module, *args).arguments
                found[path.removesuffix(".attn")] = module, dict(names), output

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        plain(**given)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_map_is_the_slope_of_transformers_own_module(case: str) -> None:
    model, plain = models(case)
    mask = torch.ones(2, 64, 96).long()
    mask[1, 40:] = 0
    mask[1, :, 50:] = 0
    given = {"pixel_values": PICTURES} | ({} if case == "RT-DETR" else {"pixel_mask": mask})
    maps, expected = model.sampled_maps(**given), sampled(plain, given)
    assert sorted(maps) == sorted(expected)
    for path, found in maps.items():
        module, names, output = expected[path]
        of_heads = output.unflatten(-1, (found.map.shape[1], -1)).transpose(1, 2)
        torch.testing.assert_close(found.map @ found.values, of_heads, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.values.transpose(1, 2), names["value"])
        names.pop("self")
        values = names.pop("value").clone().requires_grad_()
        again = module(value=values, **names).unflatten(-1, (found.map.shape[1], -1))
        for query in (0, found.map.shape[2] - 1):
            (slope,) = torch.autograd.grad(again[:, query, :, 0].sum(), values, retain_graph=True)
            row = found.map.tile(slice(query, query + 1), slice(None))[:, :, 0]
            torch.testing.assert_close(row, slope[..., 0].transpose(1, 2), rtol=1e-4, atol=1e-5)
        wrote = plain.get_submodule(path).output_proj(output)
        torch.testing.assert_close(found.output, wrote, rtol=1e-4, atol=1e-5)
        assert float(found.map.row_mass.min()) < 0.999  # points outside of the grids
        if case != "RT-DETR":
            assert found.valid is not None
            assert found.valid.all(1).tolist() == [True, False]
            assert not found.values.transpose(1, 2)[~found.valid].any()


def test_keys_are_named_by_level_row_and_column_and_queries_by_what_they_are() -> None:
    model, plain = models("three levels")
    maps = model.sampled_maps(PICTURES)
    encoder, decoder = maps["model.encoder.layers.0.self_attn"], maps["model.decoder.layers.1.encoder_attn"]
    names = sampled(plain, {"pixel_values": PICTURES})[encoder.path][1]
    grids = [tuple(each) for each in names["value_spatial_shapes_list"]]
    assert list(encoder.grids) == grids
    assert encoder.queries == encoder.keys == decoder.keys
    assert decoder.queries == [f"query {i}" for i in range(5)]
    (high, wide), (_, narrow) = grids[:2]
    assert (high, wide) != (wide, high)
    assert encoder.keys[wide + 2] == "level 0: 1,2"
    assert encoder.keys[high * wide + narrow] == "level 1: 1,0"
    rows = decoder.rows([4, 1], batch=1)
    assert rows.query_token.values.tolist() == ["query 4", "query 1"]
    second = rows[..., rows.key_level.values == 1]
    picture = hw.on_grid(second)
    expected = decoder.map.dense()[1][:, [4, 1], high * wide : high * wide + grids[1][0] * narrow]
    torch.testing.assert_close(
        torch.from_numpy(picture.values), expected.unflatten(-1, grids[1]), rtol=0, atol=0
    )
    assert encoder.rows([]).shape == (4, 0, encoder.map.keys)
    with pytest.raises(HeadError, match=r"has 5 queries in 2 examples; got queries \[5\] of 0"):
        decoder.rows([5])


def test_nothing_is_as_large_as_queries_times_keys() -> None:
    model, _ = models("three levels")
    with torch.no_grad():
        found = model.sampled_maps(torch.zeros(1, 3, 256, 320))["model.encoder.layers.0.self_attn"]
    _, heads, queries, keys = found.map.shape
    assert found.map.weights.shape == (1, heads, queries, 3 * 4 * 4)  # levels · points · cells around a point
    assert 10 * found.map.weights.numel() < heads * queries * keys


def test_a_module_that_gives_something_else_is_refused_by_name() -> None:
    model, _ = models("three levels")
    inner = model.hf.get_submodule("model.decoder.layers.0.encoder_attn.attn")
    handle = inner.register_forward_hook(lambda _, __, out: out * 1.001)
    try:
        with pytest.raises(ModelError, match=r"model.decoder.layers.0.encoder_attn has no map: .* differs"):
            model.sampled_maps(PICTURES)
    finally:
        handle.remove()


def test_other_models_are_refused_and_shown_the_way() -> None:
    model, _ = models("three levels")
    with pytest.raises(ModelError, match=r"model.sampled_maps\(…\) those of its deformable attention"):
        model.mixer_maps(PICTURES)
    assert sum("sampled_maps reads them" in told for told in model.unread) == 2
    with pytest.raises(ModelError, match="has no deformable attention"):
        hw.load("tasks-4l").sampled_maps("When Mary")
    other = made("RTDetrV2ForObjectDetection", RT | {"decoder_n_levels": 3})
    with (
        pytest.raises(ModelError, match=r"RTDetrV2\w+ \(model.decoder.layers.0.encoder_attn\) has no map"),
        reading("another", other, {}),
    ):
        pass
