"""Records that keep the maps of layers without softmax attention: in memory, on the CPU, on disk, saved and opened."""

from pathlib import Path
from typing import Any, Literal

import jaxtyping
import pytest
import torch
from hybrid_models import hybrid
from record_files import rewritten
from torch import Tensor

import headwater as hw
from headwater.lens.errors import HeadError, RecordError
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.records.pack_maps import Packer, unpack_effective

IDS = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(0))
KEEP = ("qk", "mixers")


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "lfm2"])
@pytest.mark.parametrize("keep_on", ["device", "cpu", "disk"])
def test_records_hold_the_maps_and_files_give_them_back(
    name: str, keep_on: Literal["device", "cpu", "disk"], tmp_path: Path
) -> None:
    model = hw.load(hybrid(name))
    record = model.record(IDS, keep=KEEP, keep_on=keep_on)
    saved = hw.Record.open(record.save(tmp_path / "record.safetensors"), verify=True)
    direct = model.mixer_maps(IDS)
    assert list(direct) == [mixer.layer for mixer in model.mixers]
    for found in (record, saved):
        assert list(found.effective) == list(direct)
        for layer, expected in direct.items():
            kept = found.effective_map(layer)
            assert kept.map.dense().equal(expected.map.dense())
            assert kept.inner.equal(expected.inner)
            assert kept.output.equal(expected.output)
            assert (kept.kind, kept.path, kept.name) == (expected.kind, expected.path, expected.name)
            assert kept.provenance["model"] == found.provenance["model"] == expected.provenance["model"]


def test_what_is_not_kept_is_said_in_one_line() -> None:
    model = hw.load(hybrid("qwen3_next"))
    record = model.record(IDS)
    with pytest.raises(RecordError, match=r"record with keep=\('qk', 'mixers'\)"):
        record.effective_map(0)
    with pytest.raises(HeadError, match="layer 3 has no mixer; mixers are in layers 0, 1, 2"):
        record.effective_map(3)
    with pytest.raises(RecordError, match="generate first and record the finished text"):
        model.generate(IDS, max_new_tokens=2, record=True, keep=KEEP)
    plain = hw.load("tasks-4l").record("When Mary", keep=KEEP)
    assert plain.effective == {}
    assert "mixers" in model.estimate(IDS, keep=KEEP).parts
    assert model.estimate(IDS, keep=KEEP).bytes > model.estimate(IDS).bytes


def test_the_estimate_covers_what_is_kept() -> None:
    for name in ("qwen3_next", "jamba", "nemotron_h"):
        model = hw.load(hybrid(name))
        record = model.record(IDS, keep=("mixers",))
        tensors: dict[str, Tensor] = {}
        packer = Packer(tensors.__setitem__)
        for layer, each in record.effective.items():
            packer.pack(each, str(layer))
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert held <= model.estimate(IDS, keep=("mixers",)).parts["mixers"]


def test_files_from_strangers_are_held_to_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    record = hw.load(hybrid("jamba")).record(IDS, keep=("mixers",))
    tensors: dict[str, Tensor] = {}
    packed = Packer(tensors.__setitem__).pack(record.effective_map(0), "mixer.0")
    found = unpack_effective(packed, tensors)
    assert isinstance(found, EffectiveMap)
    assert found.map.dense().equal(record.effective_map(0).map.dense())
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own check of shapes
    for name in tensors:
        for wrong in (tensors[name][:-1], tensors[name][..., None], tensors[name].int()):
            with pytest.raises(ValueError, match=r"effective map|groups|unpack"):
                unpack_effective(packed, {**tensors, name: wrong})
    changed: list[dict[str, Any]] = [
        {**packed, "map": packed["map"]["q"]}, {**packed, "layer": "0"}, {**packed, "map": {"type": "Mask"}},
        {**packed, "map": {**packed["map"], "delta": 3}}, {**packed, "provenance": {}},
    ]  # fmt: skip
    for item in changed:
        with pytest.raises((ValueError, TypeError, KeyError)):
            unpack_effective(item, tensors)


def test_a_layer_number_or_a_length_that_a_file_changed_is_refused(tmp_path: Path) -> None:
    record = hw.load(hybrid("lfm2")).record(IDS, keep=("mixers",))
    path = record.save(tmp_path / "record.safetensors")

    def moved(header: Any, _: Any) -> None:
        header["effective"]["1"] = header["effective"].pop("0")

    rewritten(path, moved)
    with pytest.raises(RecordError, match="the effective map of layer 1 does not fit"):
        hw.Record.open(path)
