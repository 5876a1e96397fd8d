"""Records on disk: an exact round trip of every level and rule, mapped reading, streaming, and the estimate.

Seen to fail with the residual scaled by 1.0001 and without edits in the estimate.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from record_files import recorded
from safetensors.torch import load_file

import headwater as hw
from headwater.kernels import edits
from headwater.kernels.attend import attend
from headwater.kernels.edits import patterns
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.errors import RecordError
from headwater.lens.records import safetensors_file
from headwater.lens.records.pack_maps import Packer, unpack
from headwater.lens.records.record import DEFAULT_STATISTICS


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


def test_ten_gigabytes_are_opened_in_megabytes(tmp_path):
    """A sparse file: its header says that a layer's values are 10.9 GB, of which a page is read."""
    path = recorded("gpt2", keep=("qkv",)).save(tmp_path / "big.safetensors")
    text = path.read_bytes()
    size = int.from_bytes(text[:8], "little")
    head = json.loads(text[8 : 8 + size])
    old = head["value.2"]
    shape, data = [*old["shape"][:3], 20_000_000], len(text) - 8 - size
    assert data - old["data_offsets"][1] < 2000, "the last tensors are small, so they can move behind it"
    moved = {
        n: t
        for n, t in head.items()
        if n != "__metadata__" and t["data_offsets"][0] >= old["data_offsets"][0]
    }
    pieces, place = [], old["data_offsets"][0]
    for name, entry in sorted(moved.items(), key=lambda item: item[0] == "value.2"):
        begin, end = entry["data_offsets"]
        length = 4 * torch.Size(shape).numel() if name == "value.2" else end - begin
        pieces.append(b"" if name == "value.2" else text[8 + size + begin : 8 + size + end])
        head[name] = entry | {"data_offsets": [place, place + length]}
        place += length
    head["value.2"]["shape"] = shape
    meta = head["__metadata__"]
    table = {n: t for n, t in head.items() if n != "__metadata__"}
    meta["headwater_digest"] = safetensors_file._digest(meta["headwater"], table)
    first = json.dumps(head).encode()
    first += b" " * (-len(first) % 8)
    with path.open("wb") as file:
        file.write(len(first).to_bytes(8, "little") + first + text[8 + size :][: old["data_offsets"][0]])
        file.write(b"".join(pieces))
        file.truncate(8 + len(first) + place)
    assert path.stat().st_size > 10e9
    code = (
        "import headwater as hw, psutil; hw.Record; p = psutil.Process(); a = p.memory_info().rss;"
        f"r = hw.Record.open({str(path)!r}); r.tokens.sum(); r.values[2][0, 0, 0, :9].sum();"
        "print(r.values[2].numel(), p.memory_info().rss - a)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers, grown = map(int, done.stdout.split())
    assert numbers > 2.5e9
    assert grown < 60_000_000


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


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gptoss", "bert"])
@pytest.mark.parametrize("keep", [(), ("qk",), ("residual",), ("qkv", "residual")])
def test_streaming_to_disk_is_the_same_record(name, keep, tmp_path):
    model = hw.load(tiny_models.tiny(name))
    ids, mask = tiny_models.batch(1)
    with model.edit(hw.Redistribute([0], 0.2), hw.Knockout([4], [1])):
        held = model.record(ids, mask, keep=keep)
        path = tmp_path / "run.safetensors"
        for found in (
            model.record(ids, mask, keep=keep, keep_on="disk", path=path),
            model.record(ids, mask, keep=keep, keep_on="disk"),
            model.record(ids, mask, keep=keep, keep_on="cpu"),
            hw.Record.open(path, verify=True),
        ):
            assert found.to_xarray().identical(held.to_xarray())
            assert found.maps.keys() == held.maps.keys()
            for layer in held.maps:
                assert found.pattern(layer).equal(held.pattern(layer))
            assert found.residuals.keys() == held.residuals.keys()
            assert all(found.residual(place).equal(held.residual(place)) for place in held.residuals)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_residual_stream_is_that_of_transformers(name):
    """Its hidden states are the streams before each block; the last is behind the final norm, where there is one."""
    model = hw.load(tiny_models.tiny(name))
    ids, mask = tiny_models.batch(1)
    record = model.record(ids, mask, keep=("residual",))
    with torch.no_grad():
        streams = model.hf(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layer in record.layers:
        assert record.residual(layer)[mask.bool()].equal(streams[layer][mask.bool()])
    norm = getattr(model.hf.base_model, "norm", getattr(model.hf.base_model, "ln_f", torch.nn.Identity()))
    with torch.no_grad():
        assert norm(record.residual("final"))[mask.bool()].equal(streams[-1][mask.bool()])
    with pytest.raises(RecordError, match="keep=\\('qk', 'residual'\\)"):
        model.record(ids, mask).residual(0)


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


def test_rules_and_edits_of_every_kind_come_back(tmp_path):
    """Normalisers, slopes, documents and every edit that is no function, in one map each."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(3))
    heads = torch.tensor([True, False, True, True])
    keys, rows = torch.arange(9)[None] < 2, torch.arange(9)[None] > 3
    weights: tuple = (
        edits.Rescale(heads, keys, ~keys, 0.3, rows[:, None], edits.RowCondition(keys, ~keys, 5.0, 0.01)),
        edits.MixIdentity(heads, 0.1),
        edits.MixPattern(heads, 0.2, patterns.Fixed(torch.rand(1, 1, 9, 9, generator=generator))),
        edits.MixPattern(heads, 0.2, patterns.Matching(torch.tensor([[1, 2, 1, 2, 3, 1, 2, 1, 1]]))),
        edits.MixPattern(heads, 0.1, patterns.Offset(1), rows[:, None]),
        edits.MixPattern(heads, 0.1, patterns.Uniform()),
    )
    scores: tuple = (
        edits.ScaleScores(heads, 1.5),
        edits.BlockScores(heads, rows, keys),
        edits.BiasKeys(heads, torch.randn(1, 9, generator=generator)),
        edits.EmphasiseScores(heads, rows, keys, 0.5),
    )
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    mask = Mask(9, 9, right=0, left=6, documents=documents)
    rules = [
        ScoreRule(0.3, mask, softcap=3.0, sinks=torch.randn(4), bias=torch.randn(1, 4, 9, 9), edits=scores)
    ]
    rules += [ScoreRule(0.3, Mask(9, 9, right=0), alibi=torch.rand(4))]
    rules += [
        ScoreRule(0.3, Mask(9, 9, right=0), normaliser=Normaliser(name))
        for name in ("softmax1", "sigmoid", "cog", "softplus", "lssa", "elu1", "linear")
    ]
    rules += [ScoreRule(0.3, Mask(9, 9), normaliser=Normaliser("sinkhorn"))]
    record = recorded("gpt2")
    for rule in rules:
        map = attend(q, k, v, rule, weights if rule.normaliser is None else ())[1]
        other = edits.MixPattern(heads, 0.5, patterns.OfMap(map))
        for found in (map, attend(q, k, v, ScoreRule(0.3, Mask(9, 9, right=0)), (other,))[1]):
            tensors: dict[str, torch.Tensor] = {}
            packed = json.loads(json.dumps(Packer(tensors.__setitem__).pack(found, "m")))
            assert unpack(packed, tensors).dense().equal(found.dense())
    seen = edits.MaskScores(heads, lambda b, h, i, j: (i - j) % 2 == 0)
    record.maps[0] = attend(q, k, v, ScoreRule(0.3, Mask(9, 9, right=0), edits=(seen,)))[1]
    with pytest.raises(RecordError, match=r"keep=\(\)"):
        record.save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
