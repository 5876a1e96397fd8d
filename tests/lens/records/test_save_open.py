"""Records (`contents.py`) written and opened again: an exact round trip, read by this program and by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from record_files import recorded, rewritten
from safetensors.torch import load_file

import headwater as hw
from headwater.lens.errors import RecordError
from headwater.lens.loading import zoo


@pytest.mark.parametrize("name", tiny_models.ALL)
@pytest.mark.parametrize("edited", [False, True])
def test_a_round_trip_is_exact(name, edited, tmp_path):
    edits = [
        hw.Redistribute([0], 0.2),
        hw.TowardIdentity(0.1, layers=1),
        hw.Knockout([4], [1]),
        hw.Temperature(2.0),
    ]
    record = recorded(
        name,
        *(edits if edited else ()),
        keep=("qkv",),
        groups={"start": [0]},
        statistics=("mass", "received"),
    )
    read = hw.Record.open(record.save(tmp_path / "run.safetensors"))
    assert read.tokens.equal(record.tokens)
    assert read.valid.equal(record.valid)
    assert (read.strings, read.layers, read.provenance) == (record.strings, record.layers, record.provenance)
    for layer in record.layers:
        assert read.pattern(layer).equal(record.pattern(layer))
        assert read.values[layer].equal(record.values[layer])
        assert (read.map(layer).T @ torch.ones(17, 1)).equal(record.map(layer).T @ torch.ones(17, 1))
    for statistic in ("mass", "received", "entropy"):  # the last was not recorded: it comes from the maps
        assert read.statistic(statistic).identical(record.statistic(statistic))


def test_statistics_alone(tmp_path):
    record = recorded("gpt2", keep=())
    read = hw.Record.open(record.save(tmp_path / "run.safetensors"))
    assert read.to_xarray().identical(record.to_xarray())
    with pytest.raises(RecordError, match=r"keep=\('qk',\)"):
        read.map(0)


def test_a_file_is_read_by_safetensors_alone(tmp_path):
    """Another program needs no Headwater: plain names, plain tensors, JSON."""
    record = recorded(
        "llama", keep=("qkv", "residual"), groups={"start": [0]}, statistics=("entropy", "mass")
    )
    tensors = load_file(record.save(tmp_path / "run.safetensors"))
    assert tensors["tokens"].equal(record.tokens)
    assert json.loads(bytes(tensors["strings"].tolist())) == record.strings
    assert tensors["statistic.mass.2"].nan_to_num(-1).equal(record.statistics["mass"][:, 2].nan_to_num(-1))
    assert tensors["map.1.k"].equal(record.map(1).k)
    assert tensors["value.0"].equal(record.values[0])
    assert tensors["residual.final"].equal(record.residual("final"))


def test_pictures_stay_in_a_file_and_are_checked(tmp_path: Path) -> None:
    record = hw.load(zoo.build("clip")).record(**zoo.inputs("clip"))
    path = record.save(tmp_path / "clip.safetensors")
    assert hw.Record.open(path).part("vision").grids == record.part("vision").grids != ()
    for numbers in (
        [0, 1, 1, 3, 3, 2, 1],
        [0, 8, 1, 3, 3, 3, 1],
        [2, 1, 1, 3, 3, 3, 1],
        [0, 1, 2**40, 2**40, 1, 1, 1],
        [0, 1, 1, 3, 3, 3, 2],
    ):

        def lie(header, tensors, numbers=numbers):
            (name,) = (name for name in tensors if name.endswith("grids"))
            tensors[name] = torch.tensor([numbers])

        rewritten(path, lie)
        with pytest.raises(RecordError, match="a picture"):
            hw.Record.open(path)
