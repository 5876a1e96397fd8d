"""`headwater corpus`: texts in, a result out; shards merged; errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import headwater as hw
from headwater.command import corpus as module
from headwater.command.cli import app


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (("a", "When Mary and John went"), ("b", "Mary gave a drink to John"), ("c", "")):
        (folder / f"{name}.txt").write_text(text)
    return folder


def run(*given: object, code: int = 0) -> str:
    found = CliRunner().invoke(app, ["corpus", *map(str, given)])
    assert found.exit_code == code, found.output
    return found.stderr if code else found.stdout


def test_shards_are_merged_and_shown(texts, tmp_path) -> None:
    whole, a, b, merged = (tmp_path / f"{name}.safetensors" for name in ("whole", "a", "b", "merged"))
    told = run(texts, "--out", whole)
    assert "2 texts" in told
    assert "1 empty" in told
    assert "not for:" in told
    for shard, out in (("1/2", a), ("2/2", b)):
        assert "not finished" in run(texts, "--shard", shard, "--out", out)
    run("merge", b, a, "--out", merged)
    shown = json.loads(run(merged, "--by", "previous", "--json"))
    assert shown["finished"]
    assert shown["texts"] == 2
    assert shown["heads"] == json.loads(run(whole, "--by", "previous", "--json"))["heads"]
    best = hw.Corpus.open(whole).find("previous", 1)
    assert (shown["heads"][0]["layer"], shown["heads"][0]["head"]) == best.index[0]
    run(merged, "--headvis", tmp_path / "tree")
    assert len(list((tmp_path / "tree" / "heads").iterdir())) == 32
    run(merged, "--small", "--out", tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < merged.stat().st_size


@pytest.mark.parametrize(
    "given",
    [
        ["no"], ["merge"], ["merge", "no.safetensors"], ["no.safetensors"], ["a", "b"], ["{texts}", "--shard", "2"],
        ["{texts}", "--shard", "3/2"], ["{texts}", "--length", "9999"], ["{texts}", "--small"],
        ["{texts}", "--headvis", "h"],
        ["{texts}", "--by", "entropies"], ["{texts}", "--out", "/no/such/folder/r.safetensors"],
        ["{texts}", "--model", "vit-digits"],
    ],
)  # fmt: skip
def test_errors_are_one_line(texts, given) -> None:
    told = run(*(each.format(texts=texts) for each in given), code=2)
    assert len(told.strip().splitlines()) == 1, told


def test_the_time_that_is_left_is_that_of_this_run(monkeypatch, capsys) -> None:
    """Texts that an earlier run has read take no time. Seen to fail with all texts over the time of this run."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    tell = module._teller()
    for seconds, done in ((5.0, 1000), (605.0, 1100), (1205.0, 1200), (6005.0, 2000)):
        now[0] = seconds
        tell(done, 2000)
    assert capsys.readouterr().err.splitlines() == [
        "1000 of 2000 texts", "1100 of 2000 texts, about 90 min left", "1200 of 2000 texts, about 80 min left",
        "2000 of 2000 texts",
    ]  # fmt: skip
