"""Files of strangers on the command line: each is one line and exit code 2, within bounds of memory and time.

Seen to fail: a pipe opened without O_NONBLOCK (it waits), links followed, the length of a sound not looked at, samples
that are NaN taken, pictures together not bounded.
"""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sense_folders
from scipy.io import wavfile

from headwater.lens.media import pictures

CRC_AT = 29  # of the header chunk of a PNG


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = {"--image": "vit_classifier", "--audio": "whisper"}
    return {option: sense_folders.save(name, folder / name) for option, name in names.items()}


def png(width: int = 30, height: int = 20) -> bytes:
    into = io.BytesIO()
    sense_folders.photograph(size=(width, height)).save(into, "PNG")
    return into.getvalue()


def promised(width: int, height: int) -> bytes:
    """A whole PNG of one pixel, whose header promises more; its checksum is right."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = png(1, 1)
    return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[CRC_AT + 4 :]


def jpeg() -> bytes:
    into = io.BytesIO()
    sense_folders.photograph().save(into, "JPEG")
    return into.getvalue()


def gif() -> bytes:
    """A GIF whose screen is as large as one can be."""
    into = io.BytesIO()
    frames = [sense_folders.photograph(n) for n in range(3)]
    frames[0].save(into, "GIF", save_all=True, append_images=frames[1:])
    whole = into.getvalue()
    return whole[:6] + struct.pack("<HH", 65535, 65535) + whole[10:]


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    into = io.BytesIO()
    wavfile.write(into, rate, samples)
    return into.getvalue()


def lying(size: int) -> bytes:
    """A WAV whose data chunk says that it has so many bytes."""
    whole = wav(np.zeros(100, np.int16))
    return whole[:40] + struct.pack("<I", size) + whole[44:]


SAMPLES = np.zeros(100, np.float32)
CASES: dict[str, tuple[str, bytes, str]] = {
    "bomb.png": ("--image", promised(60_000, 60_000), "pixels"),
    "thin.png": ("--image", promised(2**31 - 1, 1), "pixels"),
    "none.png": ("--image", promised(0, 0), ""),
    "half.jpg": ("--image", jpeg()[:400], "broken"),
    "crc.png": ("--image", png()[:CRC_AT] + b"\0\0\0\0" + png()[CRC_AT + 4 :], ""),
    "pale.png": ("--image", png()[:60] + b"\xff" * 40 + png()[100:], "broken"),
    "bomb.gif": ("--image", gif(), "pixels"),
    "a.svg": ("--image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    "text.png": ("--image", b"this is a text\n" * 9, "no picture"),
    "empty.png": ("--image", b"", "no picture"),
    "sound.png": ("--image", wav(SAMPLES), "a sound or a film"),
    "lies.wav": ("--audio", lying(2**32 - 2), "no WAV file that is whole"),
    "odd.wav": ("--audio", lying(201), "says 201 bytes of samples and has 200"),
    "silent.wav": ("--audio", wav(SAMPLES[:0]), ""),
    "nan.wav": ("--audio", wav(SAMPLES * np.float32(np.nan)), "holds NaN, infinite or huge samples"),
    "fast.wav": ("--audio", wav(SAMPLES, 10**9), "1000000000 samples a second"),
    "text.wav": ("--audio", b"RIFF and so on", "no WAV file"),
    "long.wav": ("--audio", wav(np.zeros(601_000, np.uint8), 1000), "the most is 600 s"),
    "picture.wav": ("--audio", png(), "no WAV file"),
}


def refused(run, words: str) -> None:
    assert run.exit_code == 2, (run.stdout, run.stderr, run.exception)
    assert (run.stdout, len(run.stderr.splitlines())) == ("", 1), run.stderr
    assert words in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_is_one_line(headwater, models, tmp_path: Path, name: str) -> None:
    option, content, words = CASES[name]
    (tmp_path / name).write_bytes(content)
    refused(headwater("record", option, tmp_path / name, "-m", models[option]), words)


@pytest.mark.parametrize("option", ["--image", "--audio"])
def test_what_is_no_plain_file_is_one_line(headwater, models, tmp_path: Path, option: str) -> None:
    (tmp_path / "whole").write_bytes(png())
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "link", "is a link"),
        (tmp_path / "folder", "can not be read"),
        (tmp_path / "pipe", "not a plain file"),
        (Path("/dev/zero"), "not a plain file"),
        (tmp_path / "no", "No such file"),
    ):
        refused(
            headwater("record", option, path, "-m", models[option]),
            words if path.name != "folder" else "folder",
        )


def test_pictures_are_bounded_together(headwater, models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "MOST_TOGETHER", 1000)
    (tmp_path / "a.png").write_bytes(png())
    two: list[str | Path] = ["--image", tmp_path / "a.png"] * 2
    refused(
        headwater("record", *two, "-m", models["--image"]), "2 pictures have more than 1,000 pixels together"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [lambda: promised(60_000, 60_000), lambda: promised(8000, 8000), gif],
    ids=["bomb", "large", "gif"],
)
def test_memory_stays_small(tmp_path: Path, make: Callable[[], bytes]) -> None:
    """As a process: a picture is refused before its pixels have a place, or read within what one may take."""
    (tmp_path / "bomb.png").write_bytes(make())
    code = (
        "import resource, sys; from headwater.lens.media.pictures import picture; from headwater.lens.errors import "
        "PromptError\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\ntry: picture(sys.argv[1])\n"
        "except PromptError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bomb.png"], capture_output=True, timeout=60, check=True
    )
    unit = 1024 if sys.platform == "linux" else 1
    assert int(run.stdout) * unit < 4 * 3 * pictures.MOST_PIXELS
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime < 60
