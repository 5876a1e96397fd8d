"""Models taken apart by accelerate or torch: on one device they are the undivided one, on several they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.running.placed import refuse_divided

EDITS = [
    hw.ScaleHeads({"1.1": 0.0, "2.0": 0.5}),
    hw.Knockout([-1], [2], layers=[0]),
    hw.EditResidual(1, "scale", 2.0),
]
PLACES = (
    "model.embed_tokens",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
    "model.layers.0",
    "model.layers.1",
)


def dispatched(last: str, **how) -> nn.Module:
    """A model that accelerate has taken apart, its last layer in the place `last`."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate, which is optional")
    from accelerate import dispatch_model

    places: dict[str, Any] = dict.fromkeys(PLACES, "cpu") | {"model.layers.2": last}
    return dispatch_model(tiny_models.tiny("llama"), places, **how)


def test_records_and_edits_of_a_model_with_hooks_are_those_of_the_undivided_one():
    """accelerate wraps the forward of every module. Bit for bit; seen to fail with one edit left out on a side."""
    ids, _ = tiny_models.batch(12, (8,))
    hooked, whole = hw.load(dispatched("cpu", force_hooks=True)), hw.load(tiny_models.tiny("llama"))
    assert all(hasattr(layer, "_hf_hook") for layer in hooked.hf.model.layers)
    assert hooked(ids).equal(whole(ids))
    for edits in ([], *([edit] for edit in EDITS), EDITS):
        found = []
        for model in (hooked, whole):
            with model.edit(*edits):
                record = model.record(ids, keep=("qkv", "residual"))
                found.append((model(ids), record))
        (one, record), (other, expected) = found
        assert one.equal(other)
        assert not edits or not one.equal(whole(ids))
        for layer in whole.layers:
            assert record.pattern(layer).equal(expected.pattern(layer))
            assert record.residual(layer).equal(expected.residual(layer))
        assert record.statistic("entropy").equals(expected.statistic("entropy"))
    rollouts = [hw.analyses.rollout(model.record(ids)) for model in (hooked, whole)]
    assert rollouts[0].equals(rollouts[1])


def test_weights_on_disk_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"offloaded \(device_map\), first model.layers.2"):
        hw.load(dispatched("disk", main_device="cpu", offload_dir=tmp_path))


def test_weights_on_several_devices_are_refused():
    """The second device is pretended: no machine of the tests has two."""
    with FakeTensorMode():
        far = nn.Parameter(torch.empty(2, device="cuda"))
    near = nn.Parameter(torch.zeros(2))
    with pytest.raises(
        ModelError, match=r"weights of m lie on several devices \(device_map\): cpu from a, cuda:0 from b"
    ):
        refuse_divided([("a", near), ("b", far)], "m")
    refuse_divided([("a", far), ("b", far)], "m")
    refuse_divided(
        [("a", near), ("b", near), ("offloaded", nn.Parameter(torch.empty(2, device="meta")))], "m"
    )


@pytest.fixture
def mesh():
    """Devices over which tensors can be cut, of which there is one."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_weights_that_are_cut_over_devices_are_refused(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    model, module = tiny_models.tiny("llama"), nn.MultiheadAttention(8, 2, batch_first=True)
    for owner in (model.model.layers[1].self_attn.q_proj, module.out_proj):
        owner.weight = nn.Parameter(distribute_tensor(owner.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(
        ModelError, match=r"cut over devices \(tp_plan, FSDP\), first model.layers.1.self_attn.q_proj"
    ):
        hw.load(model)
    with pytest.raises(ModelError, match=r"cut over devices \(tp_plan, FSDP\), first out_proj.weight"):
        hw.load(module, sample=torch.zeros(1, 3, 8))
