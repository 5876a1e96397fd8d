"""The estimate of a record is what memory and disk take; more than there is is refused before the run.

Seen to fail without edits in the estimate.
"""

from __future__ import annotations

import pytest
import tiny_models

import headwater as hw
from headwater.kernels.maps import statistics as kernel
from headwater.lens.errors import ResourceError
from headwater.lens.records import memory, plan
from headwater.lens.records.pack_maps import Packer
from headwater.lens.records.record import DEFAULT_STATISTICS


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("gpt2"))


def test_more_memory_than_there_is_is_refused_before_running(model, monkeypatch):
    import psutil

    class Little:
        available = 100_000

    ids, _ = tiny_models.batch()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    with pytest.raises(ResourceError, match=r"use keep=\(\) for statistics alone \(\d"):
        model.record(ids.repeat(200, 1))


def test_what_a_small_record_does_without_is_not_asked(model, monkeypatch):
    """Nothing of a file, and of the free memory nothing that a model would not have run out of."""
    ids, _ = tiny_models.batch()
    recorders = plan.recorders(model, model.to_tokens(ids), ("entropy",), "all", (), None)
    monkeypatch.setattr(memory, "free_memory", lambda: 10**6)
    small, whole = memory.total(recorders.values(), whole=False), memory.total(recorders.values())
    assert (small.file, small.bytes) == (0, whole.bytes)
    assert (small.available > 10**12, whole.available) == (True, 10**6)
    monkeypatch.setattr(memory, "SURE", small.bytes - 1)
    assert memory.total(recorders.values(), whole=False).available == 10**6


@pytest.mark.parametrize("keep", [(), ("qk",), ("qkv",)])
def test_the_estimate_is_what_a_record_keeps(keep):
    for name in ("gpt2", "llama", "gemma2"):
        model = hw.load(tiny_models.tiny(name))
        ids, _ = tiny_models.batch()
        settings = {"keep": keep, "statistics": kernel.NAMES, "groups": {"a": [0], "b": [1]}}
        record = model.record(ids, **settings)
        kept = sum(x.nbytes for x in record.statistics.values())
        kept += sum(x.nbytes for m in record.maps.values() for x in (m.q, m.k, m.lse))
        kept += sum(x.nbytes for x in record.values.values())
        assert model.estimate(ids, **settings).bytes == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("keep", [(), ("qk",), ("qkv", "residual")])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_estimate_is_what_memory_and_disk_take(name, keep, tmp_path):
    model = hw.load(tiny_models.tiny(name))
    ids, mask = tiny_models.batch(1, (60, 41))
    settings = {"keep": keep, "groups": {"start": [0]}, "statistics": (*DEFAULT_STATISTICS, "mass")}
    with model.edit(hw.Redistribute([0], 0.2), hw.TowardIdentity(0.1), hw.Knockout([4], [1])):
        expected = model.estimate(ids, mask, **settings)
        record = model.record(ids, mask, **settings)
        path = tmp_path / "streamed.safetensors"
        model.record(ids, mask, keep_on="disk", path=path, **settings)
    tensors = [record.tokens, record.valid, *record.statistics.values(), *record.groups.values()]
    tensors += [*record.values.values(), *record.residuals.values()]
    packer = Packer(lambda _, tensor: tensors.append(tensor))
    for layer, map in record.maps.items():
        packer.pack(map, str(layer))
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert expected.bytes == pytest.approx(held, rel=0.1)
    for file in (record.save(tmp_path / "saved.safetensors"), path):
        assert expected.file == pytest.approx(file.stat().st_size, rel=0.1)
