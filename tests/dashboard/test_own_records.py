"""Uploaded records: what is none is refused in one line before it is kept, and the rest opens by its digest alone."""

from __future__ import annotations

import pickle

import pytest
from record_files import recorded, rewritten

import headwater as hw
from headwater.dashboard.running import models
from headwater.dashboard.state import own_records, workspace
from headwater.dashboard.state.address import from_address
from headwater.lens.errors import HeadwaterError, ModelError


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "run.safetensors"
    return recorded("gpt2", hw.Redistribute([0]), keep=("qkv", "residual")).save(path).read_bytes()


def changed(content: bytes, path, change) -> bytes:
    path.write_bytes(content)
    rewritten(path, change)
    return path.read_bytes()


def put(where, name, value) -> None:
    where[name] = value


NAN = float("nan")
RAW = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "cut in its header": lambda raw: raw[:200],
    "empty": lambda raw: b"",
    "a pickle": lambda raw: pickle.dumps({"weights": [1.0]}),
    "a zip": lambda raw: b"PK\x03\x04" + bytes(100),
    "a header of 2**62 bytes": lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
    "no header": lambda raw: (2).to_bytes(8, "little") + b"{}",
}
CHANGED = {
    "a tensor of another length": lambda h, t: put(t, "tokens", t["tokens"][:, :2].contiguous()),
    "10**9 heads": lambda h, t: put(h, "n_heads", 10**9),
    "100,000 layers": lambda h, t: put(h, "layers", list(range(100_000))),
    "NaN in queries": lambda h, t: put(t, "map.1.q", t["map.1.q"] * NAN),
    "infinite values": lambda h, t: put(t, "value.0", t["value.0"] + float("inf")),
    "NaN in a stream": lambda h, t: put(t, "residual.0", t["residual.0"] * NAN),
    "NaN in a log-sum-exp": lambda h, t: put(t, "map.0.lse", t["map.0.lse"] * NAN),
    "NaN in a statistic": lambda h, t: put(t, "statistic.entropy.1", t["statistic.entropy.1"] * NAN),
    "nothing but padding": lambda h, t: put(t, "valid", t["valid"] & False),
}


@pytest.mark.parametrize("kind", [*RAW, *CHANGED])
def test_what_is_no_record_is_one_line_and_is_not_kept(kind, good, tmp_path):
    content = RAW[kind](good) if kind in RAW else changed(good, tmp_path / "x.safetensors", CHANGED[kind])
    with pytest.raises(HeadwaterError) as caught:
        own_records.take(content)
    told = str(caught.value)
    assert told.startswith(own_records.FILE)
    assert len(told) < 300
    assert "\n" not in told
    assert "/tmp" not in told  # no path of the machine
    assert workspace.names("records") == []


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ("MOST_TOKENS", "tokens, more than the 3"),
        ("MOST_HEADS", "heads, more than the 3"),
        ("MOST_PAIRS", "pairs of tok"),
    ],
)
def test_what_a_record_holds_is_bounded(bound, told, good, monkeypatch):
    own_records.take(good)
    monkeypatch.setattr(own_records, bound, 3)
    with pytest.raises(HeadwaterError, match=told):
        own_records.take(good)


def test_its_bytes_are_bounded(good, monkeypatch):
    monkeypatch.setitem(workspace.MOST_BYTES, "records", 1000)
    with pytest.raises(HeadwaterError, match="more than the 1,000 kept of records"):
        own_records.take(good)


def test_all_uploads_together_are_bounded(good, tmp_path, monkeypatch):
    own_records.take(good)
    monkeypatch.setitem(workspace.MOST_IN_ALL, "records", len(good) + 10)
    own_records.take(good)  # is there already
    other = changed(good, tmp_path / "x.safetensors", lambda h, t: put(t, "value.0", t["value.0"] * 2))
    with pytest.raises(HeadwaterError, match="delete some there"):
        own_records.take(other)


def test_a_record_opens_by_its_digest_and_is_listed_for_nobody(good, offered):
    name = own_records.take(good)
    assert name == own_records.take(good)
    assert name not in models.offered()
    assert models.is_record(name)
    assert models.called(name) == f"upload {name.removeprefix('record:')[:6]}"
    with pytest.raises(ModelError, match="holds no model"):
        models.resident(name)
    state = from_address({"model": name, "b_model": name}, models.offered(), list)
    assert (state.model, state.b_model, state.notices) == (name, name, [])


@pytest.mark.parametrize(
    "name", ["record:" + "0" * 32, "record:../../etc/passwd", "record:", "record:" + "0" * 31]
)
def test_a_link_of_what_is_not_kept_says_so(name, offered):
    assert not models.is_record(name)
    state = from_address({"model": name}, models.offered(), list)
    assert state.model == "small"
    assert "is not kept on this machine" in state.notices[0]
