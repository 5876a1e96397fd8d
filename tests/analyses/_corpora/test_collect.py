"""A corpus is resumed where it stood and divided into shards, and comes out the same, bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest

import headwater as hw
from headwater.analyses._corpora import collect as module
from headwater.analyses._corpora.state import ARRAYS


@pytest.fixture
def model(pairs):
    return pairs("llama").model


def same(one: hw.Corpus, other: hw.Corpus) -> None:
    """Every bit that both hold, but which shards they came from."""
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one.state, name), getattr(other.state, name), err_msg=name)
    assert one.state.told == other.state.told
    assert one.words == other.words
    one.state.prune(), other.state.prune()
    assert one.state.kept.keys() == other.state.kept.keys()
    for row, (where, ids) in one.state.kept.items():
        assert where == other.state.kept[row][0]
        assert ids.tolist() == other.state.kept[row][1].tolist()


def test_shards_in_any_order_are_the_whole(model, file, tmp_path) -> None:
    whole = hw.corpus(model, file, keep=2)
    shards = [
        hw.corpus(model, file, keep=2, shard=(i, 3), out=tmp_path / f"{i}.safetensors") for i in (1, 2, 3)
    ]
    assert not shards[0].complete
    for order in itertools.permutations(shards):
        merged = hw.Corpus.merge(order)
        same(merged, whole)
        assert merged.complete
    pair = hw.Corpus.merge([shards[2], shards[0]])
    assert not pair.complete
    same(hw.Corpus.merge([shards[1], pair]), whole)
    same(hw.Corpus.merge(hw.Corpus.open(tmp_path / f"{i}.safetensors") for i in (2, 1, 3)), whole)


class Killed(Exception):
    """What stops a run in the middle."""


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_run_goes_on(model, file, tmp_path, monkeypatch, stop, at) -> None:
    """Killed between two saves it begins again at the last one; Ctrl-C saves what is finished."""
    whole, out = hw.corpus(model, file), tmp_path / "r.safetensors"
    plain, calls = module.of_layer, itertools.count()

    def failing(map, text):
        if next(calls) == at * 3:  # the first layer of a text
            raise stop
        return plain(map, text)

    monkeypatch.setattr(module, "SAVED_EVERY", 0.0 if stop is Killed else 1e9)
    monkeypatch.setattr(module, "of_layer", failing)
    with pytest.raises(stop):
        hw.corpus(model, file, out=out)
    part = hw.Corpus.open(out, verify=True)
    assert part.state.told["texts"] == at
    assert not part.complete
    begun = part.shards[0]["rows"]
    monkeypatch.setattr(module, "of_layer", plain)
    heard = []
    same(hw.corpus(model, file, out=out, on_save=lambda done, of: heard.append((done, of))), whole)
    assert heard[0] == (begun, 8)
    assert heard[-1] == (8, 8)
    same(hw.corpus(model, file, out=out), whole)  # finished: nothing runs
    same(hw.Corpus.open(out), whole)


def test_a_file_of_another_run_is_refused(model, pairs, file, tmp_path) -> None:
    out = tmp_path / "r.safetensors"
    hw.corpus(model, file, out=out, texts_at_most=3)
    before = out.read_bytes()
    for other in (
        lambda: hw.corpus(model, file, out=out),
        lambda: hw.corpus(model, file, out=out, texts_at_most=3, length=9),
        lambda: hw.corpus(pairs("gpt2").model, file, out=out, texts_at_most=3),
        lambda: hw.corpus(model, file, out=out, texts_at_most=3, shard=(1, 2)),
    ):
        with pytest.raises(hw.HeadwaterError, match=r"of another run|of other shards"):
            other()
    assert out.read_bytes() == before
    assert hw.corpus(model, file, out=out, anew=True).state.told["texts"] == 5


def test_two_runs_of_one_file_do_not_meet(model, file, tmp_path, monkeypatch) -> None:
    """Seen to fail without the lock, and with one that is left standing."""
    out, link = tmp_path / "r.safetensors", tmp_path / "link.safetensors"
    monkeypatch.setattr(module, "SAVED_EVERY", 0.0)
    refused = []

    def second(done, of) -> None:
        link.unlink(missing_ok=True)
        link.symlink_to(out)
        for name in (out, link):
            with pytest.raises(hw.HeadwaterError, match="in use by another run; wait for its end") as told:
                hw.corpus(model, file, out=name, anew=True)
            refused.append(str(told.value))

    found = hw.corpus(model, file, out=out, on_save=second)
    assert set(refused) == {f"{out} is in use by another run; wait for its end"}
    same(hw.Corpus.open(out, verify=True), found)
    link.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {file.name, out.name}
    (tmp_path / f".{out.name}.lock").touch()  # of a process that was killed
    same(hw.corpus(model, file, out=out), found)


def test_texts_that_changed_are_refused(model, file, tmp_path, monkeypatch) -> None:
    out, calls, plain = tmp_path / "r.safetensors", itertools.count(), module.of_layer

    def failing(map, text):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return plain(map, text)

    monkeypatch.setattr(module, "of_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        hw.corpus(model, file, out=out)
    file.write_text(file.read_text().replace("w4", "w5", 1))  # of the same size
    with pytest.raises(hw.HeadwaterError, match="texts changed"):
        hw.corpus(model, file, out=out)


def test_what_does_not_fit_is_refused(model, pairs, file, tmp_path) -> None:
    for wrong in (
        {"length": 65},
        {"length": 1},
        {"keep": 0},
        {"shard": (3, 2)},
        {"shard": (0, 2)},
        {"texts_at_most": 0},
        {"unit": "word"},
    ):
        with pytest.raises(hw.HeadwaterError):
            hw.corpus(model, file, **wrong)
    with pytest.raises(hw.HeadwaterError, match=r"folder .* does not exist"):
        hw.corpus(model, file, out=tmp_path / "no" / "r.safetensors")


def test_a_text_is_the_same_alone_and_among_others(model, file, tmp_path) -> None:
    """No text is padded, so its numbers do not depend on its neighbours."""
    found = hw.corpus(model, file, keep=8)
    lone = tmp_path / "lone.jsonl"
    lone.write_text(json.dumps({"text": json.loads(file.read_text().splitlines()[0])["text"]}))
    alone = hw.corpus(model, lone, keep=8)
    for head in range(4):
        mine = {one.value for one in found.examples(1, head, "entropy") if one.text == 0}
        assert mine == {one.value for one in alone.examples(1, head, "entropy")}


def test_shards_of_different_corpora_are_not_merged(model, file, tmp_path) -> None:
    one = hw.corpus(model, file, shard=(1, 2))
    other = tmp_path / "other.jsonl"
    shutil.copy(file, other)
    for wrong in ([one, hw.corpus(model, other, shard=(2, 2))], [one, one], [], [one.small()]):
        with pytest.raises(hw.HeadwaterError):
            hw.Corpus.merge(wrong)
