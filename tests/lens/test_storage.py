"""Records on disk: an exact round trip, a killed writer, and files that are broken or foreign."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import headwater as hw
from headwater.lens.errors import RecordError


def recorded(name, *edits, **settings):
    model = hw.load(tiny_models.tiny(name))
    ids, mask = tiny_models.batch(1)
    with model.edit(*edits):
        return model.record(ids, mask, **settings)


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


def test_opening_maps_the_file_instead_of_reading_it(tmp_path):
    """A record of 200 MB is opened by a process that grows by a small part of that."""
    record = recorded("gpt2")
    big = tmp_path / "big.safetensors"
    record.save(big)
    tensors = load_file(big) | {"value.0": torch.zeros(50_000_000)}
    from safetensors import safe_open

    with safe_open(big, "pt") as file:
        save_file(tensors, big, metadata=file.metadata())
    code = (
        "import headwater as hw, psutil, os, sys; hw.Record; p = psutil.Process(); a = p.memory_info().rss;"
        f"r = hw.Record.open({str(big)!r}); r.tokens.sum(); print(p.memory_info().rss - a)"
    )
    grown = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert grown < 40_000_000


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.safetensors"
    record = recorded("gpt2")
    record.save(path)
    before = path.read_bytes()
    code = (
        "import sys, torch, headwater as hw; r = hw.Record.open(sys.argv[1]);"
        "r.values[0] = torch.zeros(40_000_000); print('ready', flush=True)\n"
        "while True: r.save(sys.argv[1] + '.new')"
    )
    target = tmp_path / "run.safetensors.new"
    target.write_bytes(before)
    for delay in (0.02, 0.1, 0.25):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert hw.Record.open(target).tokens.equal(record.tokens)


def broken(path, kind):
    text = path.read_bytes()
    size = int.from_bytes(text[:8], "little")
    if kind == "cut":
        path.write_bytes(text[: len(text) // 2])
    elif kind == "header length":
        path.write_bytes((2**62).to_bytes(8, "little") + text[8:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "flipped header":
        path.write_bytes(text[:20] + b"\xff\xfe" + text[22:])
    else:
        tensors = load_file(path)
        header = json.loads(json.loads(text[8 : 8 + size])["__metadata__"]["headwater"])
        if kind == "version":
            header["format"] = 99
        elif kind == "missing tensor":
            tensors.pop("map.1.q")
        elif kind == "wrong shape":
            tensors["map.1.k"] = tensors["map.1.k"][:, :, :3].contiguous()
        elif kind == "statistic":
            tensors["statistic.entropy"] = torch.zeros(2, 2)
        elif kind == "nonsense field":
            header["maps"]["1"]["mask"]["queries"] = {"a": 1}
        elif kind == "unknown edit":
            header["maps"]["1"]["edits"] = [{"type": "os.system", "tensors": []}]
        elif kind == "heads":
            header["n_heads"] = 10**9
        save_file(tensors, path, metadata={"headwater": json.dumps(header)})


KINDS = (
    "cut", "header length", "empty", "text", "foreign", "flipped header", "version", "missing tensor", "wrong shape",
    "statistic", "nonsense field", "unknown edit", "heads",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_refused_in_one_line(kind, tmp_path):
    path = recorded("gpt2", hw.Redistribute([0])).save(tmp_path / "run.safetensors")
    broken(path, kind)
    with pytest.raises(RecordError) as caught:
        hw.Record.open(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(RecordError, match="there is no file"):
        hw.Record.open(tmp_path / "none.safetensors")
    with pytest.raises(RecordError, match="is not a file"):
        hw.Record.open(tmp_path)
    record = recorded("gpt2")
    with pytest.raises(RecordError, match="does not exist"):
        record.save(tmp_path / "no" / "run.safetensors")
    with pytest.raises(RecordError, match="is a folder"):
        record.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
