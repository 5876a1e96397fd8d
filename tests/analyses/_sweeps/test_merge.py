"""Shards, merged in any order, are the run of the whole."""

import itertools

import pytest
from sweep_engines import Here, asked, open_once

import headwater as hw
from headwater.analyses._sweeps.run_sweep import resume
from headwater.lens.errors import SweepError


@pytest.fixture(autouse=True)
def here(monkeypatch):
    open_once(monkeypatch)
    monkeypatch.setattr(
        "headwater.analyses._sweeps.run_sweep._engine", lambda kind, setup, sweep, workers: Here(setup, {})
    )


def test_shards_in_any_order_are_the_whole(tmp_path):
    sweep = asked(analyses=[{"analysis": "rollout"}, {"analysis": "sink_rate"}])
    whole = hw.run_sweep(sweep, tmp_path / "whole")
    shards = [tmp_path / f"{n}" for n in (1, 2, 3)]
    for n, folder in enumerate(shards, 1):
        hw.run_sweep(sweep, folder, shard=(n, 3))
    assert [sum(hw.SweepRun(folder).counts().values()) for folder in shards] == [3, 3, 2]
    for n, order in enumerate(itertools.permutations(shards)):
        merged = hw.merge_runs(order, tmp_path / f"merged{n}")
        assert merged.digest() == whole.digest()
        assert merged.counts() == whole.counts() == {"queued": 0, "done": 8, "failed": 0}
    assert not list(merged.damaged())
    assert list(merged.table().number) == list(range(8))


def test_units_that_are_alike_are_units_each(tmp_path):
    sweep = asked(prompts=["a", "a"])
    whole = hw.run_sweep(sweep, tmp_path / "whole")
    assert whole.counts()["done"] == 2
    shards = [hw.run_sweep(sweep, tmp_path / f"{n}", shard=(n, 2)).path for n in (1, 2)]
    assert hw.merge_runs(shards, tmp_path / "merged").digest() == whole.digest()


def test_a_merge_of_some_shards_goes_on(tmp_path):
    for n in (1, 2):
        hw.run_sweep(asked(), tmp_path / f"{n}", shard=(n, 2))
    merged = hw.merge_runs([tmp_path / "2"], tmp_path / "merged")
    assert sum(merged.counts().values()) == 2
    assert hw.merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged").counts()["done"] == 4
    part = hw.merge_runs([tmp_path / "1"], tmp_path / "part")
    assert resume(tmp_path / "part").counts()["done"] == 4
    assert part.digest() == merged.digest()


def test_what_does_not_belong_together_is_refused(tmp_path):
    hw.run_sweep(asked(), tmp_path / "1", shard=(1, 2))
    hw.run_sweep(asked(dtype="float64"), tmp_path / "2", shard=(2, 2))
    with pytest.raises(SweepError, match="of different runs"):
        hw.merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    with pytest.raises(SweepError, match="no folder was given"):
        hw.merge_runs([], tmp_path / "merged")
    run = hw.SweepRun(tmp_path / "1")
    file = run.file(run.table().key[0])
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SweepError, match="another file than the one that was written"):
        hw.merge_runs([tmp_path / "1"], tmp_path / "merged")


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_shards_that_do_not_exist_are_refused(tmp_path, shard):
    with pytest.raises(SweepError, match="does not exist"):
        hw.run_sweep(asked(), tmp_path / "a", shard=shard)
