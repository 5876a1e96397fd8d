"""A run folder from a stranger: it does not choose which files are read, and nothing is written through its links."""

import hashlib
import json
from pathlib import Path

import pytest
import sense_folders
from sweep_engines import Here, asked, open_once

import headwater as hw
from headwater.analyses._sweeps.run_sweep import resume
from headwater.lens.errors import HeadwaterError, SweepError


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    open_once(monkeypatch)
    monkeypatch.setattr(
        "headwater.analyses._sweeps.run_sweep._engine", lambda kind, setup, sweep, workers: Here(setup, {})
    )


def picture(folder: Path) -> dict[str, str]:
    folder.mkdir()
    sense_folders.photograph(0).save(folder / "a.png")
    return {"file": "a.png", "sha256": hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()}


def test_a_manifest_does_not_choose_where_files_are_read(tmp_path: Path) -> None:
    """The picture lies in the user's folder, to which the manifest leads; it is read when the user says so."""
    sweep = hw.Sweep(
        model="vit-digits",
        prompts=[{"image": picture(tmp_path / "mine")}],
        analyses=[{"analysis": "rollout"}],
    )
    folder = tmp_path / "theirs" / "run"
    hw.run_sweep(sweep, folder, base=tmp_path / "mine")
    assert json.loads((folder / "manifest.json").read_text())["base"] == "../../mine"
    said: list[str] = []
    with pytest.raises(HeadwaterError, match=r"a\.png"):
        resume(folder, say=said.append)
    assert f"looked for in {folder}, not in {tmp_path / 'mine'}" in said[0]
    assert resume(folder, base=tmp_path / "mine").counts()["done"] == 1
    beside = hw.run_sweep(sweep, tmp_path / "mine" / "run", base=tmp_path / "mine")
    assert resume(beside.path).digest() == hw.SweepRun(folder).digest()


@pytest.mark.parametrize(
    "name", ["lock", "ledger.sqlite", "ledger.sqlite-journal", "units", "result", "its folder"]
)
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    run = hw.run_sweep(asked(prompts=["Mary"]), tmp_path / "run")
    result = run.file(run.table().key[0])
    path = {"result": result, "its folder": result.parent}.get(name, run.path / name)
    if path.exists():
        path.rename(tmp_path / "theirs")
    path.symlink_to(mine if name in ("units", "its folder") else mine / "file")
    with pytest.raises(SweepError, match="is a link, and a run writes through none"):
        resume(run.path)
    assert [file.name for file in mine.iterdir()] == ["file"]
    assert (mine / "file").read_text() == "mine"
