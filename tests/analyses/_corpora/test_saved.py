"""A saved corpus is the same when it is opened, and a file that was changed is refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import headwater as hw
from headwater.analyses._corpora.state import ARRAYS
from headwater.command.cli import app


@pytest.fixture
def found(pairs, file) -> hw.Corpus:
    return hw.corpus(pairs("llama").model, file, keep=2)


def test_it_comes_back(found, tmp_path) -> None:
    path = found.save(tmp_path / "c.safetensors")
    back = hw.Corpus.open(path, verify=True)
    for name in ARRAYS:
        one, other = getattr(found.state, name), getattr(back.state, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert (back.run, back.shards, back.words) == (found.run, found.shards, found.words)
    assert back.examples(1, 2, "previous") == found.examples(1, 2, "previous")
    assert "Corpus(" in CliRunner().invoke(app, ["verify", str(path)]).output


def test_a_small_one_says_the_same(found, tmp_path) -> None:
    small = hw.Corpus.open(found.small(tokens=3, keep=1).save(tmp_path / "s.safetensors"))
    assert small.table().equals(found.table())
    assert small.headvis().equals(found.headvis())
    for head in range(4):
        assert small.tokens(1, head, n=3) == found.tokens(1, head, n=3)
        assert small.examples(1, head) == found.examples(1, head)[:1]


def test_changed_files_are_refused(found, tmp_path) -> None:
    path = found.save(tmp_path / "c.safetensors")
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    cases = [whole[:n] for n in (0, 7, 100, len(whole) // 2, len(whole) - 1)]
    for at in generator.integers(0, len(whole), 30):
        cases.append(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(hw.HeadwaterError) as error:
            hw.Corpus.open(path, verify=True)
        assert "\n" not in str(error.value)


def test_a_stranger_s_file_is_refused(found, tmp_path) -> None:
    """Files whose digests agree, but whose content does not fit together."""
    path = found.save(tmp_path / "c.safetensors")
    arrays = load_file(path)
    header = {
        "corpus": 1, "told": found.state.told, "run": found.run, "shards": found.shards, "words": {},
        "where": [where for _, (where, _) in sorted(found.state.kept.items())],
    }  # fmt: skip

    def write(changed, **told):
        save_file({**arrays, **changed}, path, {"headwater": json.dumps({**header, **told})})
        return path

    hw.Corpus.open(write({}))
    run = found.run
    for changed, told in (
        ({"sums": arrays["sums"][:1]}, {}),
        ({"bins": arrays["bins"].astype(np.float32)}, {}),
        ({"kept_end": arrays["kept_end"] + 1}, {}),
        ({"more": np.zeros(1)}, {}),
        ({}, {"run": {**run, "heads": 10**9}}),
        ({}, {"run": {**run, "heads": "four"}}),
        ({}, {"run": {**run, "layers": []}}),
        ({}, {"run": {}}),
        ({}, {"told": {}}),
        ({}, {"shards": []}),
        ({}, {"words": {"x": "y"}}),
        ({}, {"where": []}),
        ({}, {"corpus": 2}),
    ):
        with pytest.raises(hw.HeadwaterError):
            hw.Corpus.open(write(changed, **told))
