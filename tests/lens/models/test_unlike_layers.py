"""Models whose layers are unlike, against hooks on the output projections of an eager copy.

Mutations seen to fail: the first layer's width taken for all, runs resumed without a trial.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from unlike_layers import CONFIGS, models

import headwater as hw
from headwater import analyses
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.masks import LazyMask
from headwater.lens.errors import HeadwaterError, ModelError

IDS = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(3))
OTHER = torch.cat([IDS[:, :4], IDS[:, 4:5] % 80 + 5, IDS[:, 5:]], 1)
Change = Callable[[int, Tensor], Tensor]  # (layer, z [batch, position, head, d]) → z


@contextlib.contextmanager
def changed(twin, change: Change) -> Iterator[None]:
    def hook(layer: int):
        def put(module, args):
            return (change(layer, args[0].unflatten(-1, (4, -1)).clone()).flatten(-2), *args[1:])

        return put

    layers = enumerate(twin.model.layers)
    handles = [block.self_attn.o_proj.register_forward_pre_hook(hook(layer)) for layer, block in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(twin, ids: Tensor, change: Change) -> Tensor:
    with torch.no_grad(), changed(twin, change):
        return twin(input_ids=ids).logits


def outputs(twin, ids: Tensor) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def keep(layer: int, z: Tensor) -> Tensor:
        found[layer] = z
        return z

    run(twin, ids, keep)
    return found


def put(layer: int, head: int, value: Tensor) -> Change:
    def change(at: int, z: Tensor) -> Tensor:
        if at == layer:
            z[:, :, head] = value
        return z

    return change


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_each_layer(name: str) -> None:
    model, twin = models(name)
    widths = [block.self_attn.q_proj.weight.shape[0] // 4 for block in twin.model.layers]
    assert [model.shape(layer).d_head for layer in model.layers] == widths
    assert model.n_heads == 4
    z = outputs(twin, IDS)
    assert [model.shape(layer).d_value for layer in model.layers] == [z[layer].shape[-1] for layer in z]
    if len(set(widths)) == 1:
        assert model.d_head == widths[0]
        return
    for ask in (
        lambda: model.d_head,
        lambda: model.d_value,
        lambda: model.head_outputs(IDS),
    ):
        with pytest.raises(ModelError, match="8 and 16 features"):
            ask()
    if "one key" in name:
        assert [model.shape(layer).kv for layer in model.layers] == [2, 1, 2, 1]
        with pytest.raises(ModelError, match="1 and 2 key–value heads"):
            analyses.edge_attribution(model, IDS, OTHER, answer="#11", wrong="#23", steps=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_edits_of_heads_are_hooks_by_hand(name: str) -> None:
    model, twin = models(name)
    z = outputs(twin, OTHER)
    for layer, head in ((1, 2), (2, 0)):
        mean = z[layer][:, :, head].mean((0, 1))
        with model.edit(hw.AblateHeads(f"{layer}.{head}", "mean", examples=OTHER)):
            found = model(IDS)
        torch.testing.assert_close(found, run(twin, IDS, put(layer, head, mean)), atol=1e-4, rtol=1e-4)
        width, offset = z[layer].shape[-1], torch.linspace(-1, 1, z[layer].shape[-1])
        with model.edit(hw.OffsetHeads({f"{layer}.{head}": offset})):
            found = model(IDS)
        plus = outputs(twin, IDS)[layer][:, :, head] + offset
        torch.testing.assert_close(found, run(twin, IDS, put(layer, head, plus)), atol=1e-4, rtol=1e-4)
        with pytest.raises(HeadwaterError, match=f"must be {width} finite numbers"):
            model.edit(hw.OffsetHeads({f"{layer}.{head}": [1.0] * (24 - width)}))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_are_hooks_by_hand(name: str, ablation) -> None:
    """Also where lower blocks hand on more than their outputs, so that runs can not start in the middle."""
    model, twin = models(name)
    z = outputs(twin, IDS)

    def loss(logits: Tensor) -> Tensor:
        each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, IDS[:, 1:], reduction="none")
        return each.mean(-1)

    plain = loss(run(twin, IDS, lambda layer, z: z))
    found = analyses.head_importance(model, IDS, how="ablation", ablation=ablation, per_example=True)
    for layer in range(4):
        for head in range(4):
            gone = z[layer][:, :, head].mean((0, 1)) * (ablation == "mean")
            expected = loss(run(twin, IDS, put(layer, head, gone))) - plain
            np.testing.assert_allclose(found[:, layer, head], expected, atol=2e-5)
    assert abs(found).max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_patched_heads_are_hooks_by_hand(name: str) -> None:
    model, twin = models(name)
    there = outputs(twin, IDS)

    def score(logits: Tensor) -> Tensor:
        return logits[:, -1, 11] - logits[:, -1, 23]

    found = analyses.patch(model, IDS, OTHER, answer="#11", wrong="#23")
    begin, end = (score(run(twin, ids, lambda layer, z: z)) for ids in (OTHER, IDS))
    for layer in range(4):
        for head in range(4):
            now = score(run(twin, OTHER, put(layer, head, there[layer][:, :, head])))
            np.testing.assert_allclose(
                found[:, layer, head], (now - begin) / (end - begin), atol=2e-3, rtol=2e-3
            )
    sent = analyses.path_patch(model, IDS, OTHER, how="denoise", answer="#11", wrong="#23", receivers="3.1.q")
    assert ("embed" in sent.sender.values) == ("streams" not in name)
    assert np.isfinite(sent.values).all()


def test_weights_of_each_width() -> None:
    model, twin = models("wide")
    found = analyses.circuit_rank(model).singular_values.sel(circuit="qk")
    for layer, block in enumerate(twin.model.layers):
        attention, gain = block.self_attn, block.input_layernorm.weight.double()
        query = (attention.q_proj.weight.double() * gain).unflatten(0, (4, -1))
        key = (attention.k_proj.weight.double() * gain).unflatten(0, (2, -1)).repeat_interleave(2, 0)
        width = query.shape[1]
        expected = torch.linalg.svdvals(query.mT @ key)[:, :width].detach()
        np.testing.assert_allclose(found[layer, :, :width], expected, rtol=1e-5)
        assert np.isnan(found[layer, :, width:]).all()
    assert analyses.composition(model).notnull().any()


@pytest.mark.parametrize("name", ["streams, shared keys"])
def test_several_streams_are_refused_where_the_stream_is_read(name: str) -> None:
    model, _ = models(name)
    record = model.record(IDS)
    assert record.layers == [0, 1, 2, 3]
    for ask in (
        lambda: model.record(IDS, keep=("qk", "residual")),
        lambda: analyses.logit_lens(model, IDS, answer="#11"),
        lambda: analyses.value_zeroing(model, IDS),
        lambda: analyses.norms(model, IDS),
    ):
        with pytest.raises(HeadwaterError, match=r"several streams at once|no final norm"):
            ask()


def test_generation_cuts_queries_out_of_the_mask() -> None:
    """Gemma 4 computes in the layers that share keys only the queries whose logits are kept."""
    model, twin = models("wide, shared keys")
    wanted = twin.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4)[:, :14], wanted)
    with torch.no_grad():
        last = model.hf(input_ids=IDS, logits_to_keep=2).logits
        torch.testing.assert_close(last, twin(input_ids=IDS).logits[:, -2:], atol=1e-4, rtol=1e-4)
    mask = LazyMask(Mask(6, 8, right=0, query_offset=2, valid_queries=torch.arange(6)[None] > 0), 1)
    every = slice(None)
    cut = mask[:, :, -2:, :].mask
    assert (cut.queries, cut.query_offset, cut.keys) == (2, 6, 8)
    assert cut.valid_queries is not None
    assert cut.valid_queries.tolist() == [[True, True]]
    assert mask[:, :, slice(0, None)].mask is mask.mask
    for index in (
        (every, every, slice(0, 3)),
        (every, every, every, slice(1, None)),
        0,
        (every, every, slice(0, 6, 2)),
    ):
        with pytest.raises(ModelError, match="computes with its attention mask"):
            mask[index]


def test_blocks_that_share_keys_do_not_run_by_themselves() -> None:
    model, _ = models("wide, shared keys")
    with pytest.raises(HeadwaterError, match="gives another output when it runs by itself"):
        analyses.value_zeroing(model, IDS[:1])
    assert analyses.value_zeroing(models("wide")[0], IDS[:1]).notnull().any()
