"""A journal loses nothing that was finished, whatever stops the run, and belongs to one run at a time.

Seen to fail with the file rewritten on opening, with no lock, with the checksum not compared, with an unfinished line
left in front of the next, and with `anew` keeping the pieces of another run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from headwater.lens import journal as module
from headwater.lens.errors import AnalysisError
from headwater.lens.journal import Journal

RUN = {"of": "this"}


def opened(path: Path, run: object = RUN, **more: bool):
    return Journal.open(path, run, AnalysisError, **more)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with opened(tmp_path / "run") as kept:
        for number in range(3):
            kept.put(str(number), number)
    return tmp_path / "run"


def pieces(path: Path, **more: bool) -> list[object]:
    with opened(path, **more) as kept:
        return [kept.get(str(number)) for number in range(3)]


def test_a_file_cut_at_any_byte_keeps_every_whole_line_and_goes_on(file: Path) -> None:
    whole = file.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for size in range(0, len(whole) + 1, 7):
        file.write_bytes(whole[:size])
        finished = max(sum(end <= size for end in ends) - 1, 0)
        with opened(file) as kept:
            assert [kept.get(str(n)) for n in range(3)] == [n if n < finished else None for n in range(3)]
            begun = file.read_bytes()
            assert begun.startswith(whole[: ends[finished]]), "nothing finished leaves the file"
            kept.put("more", size)
        with opened(file) as kept:
            assert kept.get("more") == size


def test_one_run_at_a_time(file: Path) -> None:
    with opened(file) as kept:
        with pytest.raises(AnalysisError, match="in use by another run; wait for its end"), opened(file):
            pass
        kept.put("3", 3)
        file.unlink()
        with opened(file):  # the name is free again
            pass
    assert file.exists()


def test_a_file_that_another_run_deletes_at_its_end_is_made_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    lock, seen = fcntl.flock, []

    def late(*given: object) -> None:
        if not seen:
            file.unlink()
        seen.append(lock(*given))

    monkeypatch.setattr(fcntl, "flock", late)
    with opened(file) as kept:
        kept.put("0", "new")
    assert len(seen) == 2
    assert pieces(file) == ["new", None, None]


def test_a_changed_line_is_refused_or_measured_again(file: Path) -> None:
    whole = file.read_bytes()
    changed = whole.replace(b'"[\\"1\\", 1]"', b'"[\\"1\\", 7]"')
    assert changed != whole
    file.write_bytes(changed)
    with pytest.raises(AnalysisError, match="was changed in line 3; delete it or give another name"):
        pieces(file)
    assert file.read_bytes() == changed
    assert pieces(file, anew=True) == [0, None, None]


def test_another_run_is_refused_or_begun_anew(file: Path) -> None:
    with (
        pytest.raises(AnalysisError, match=r'is of another run .of is "this" there and "that" here'),
        opened(file, {"of": "that"}),
    ):
        pass
    assert pieces(file) == [0, 1, 2]
    with opened(file, {"of": "that"}, anew=True) as kept:
        assert kept.get("0") is None
    with pytest.raises(AnalysisError, match="another run"):
        pieces(file)


def test_a_full_disk_leaves_whole_lines(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    with opened(file) as kept:
        with monkeypatch.context() as patched:

            def full(_: int) -> None:
                raise OSError(28, "No space left on device")

            patched.setattr(os, "fsync", full)
            with pytest.raises(AnalysisError, match=r"can not write .* No space left"):
                kept.put("3", "lost")
        kept.put("4", "kept")
    with opened(file) as kept:
        assert (kept.get("3"), kept.get("4")) == (None, "kept")
    assert file.read_bytes().startswith(before)


def test_what_is_written_can_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the reader is that of the writer."""
    monkeypatch.setattr(module, "MOST_BYTES", 2**20)
    with opened(file) as kept:
        kept.put("half", "x" * 2**19)
        with pytest.raises(AnalysisError, match="would be larger than 1 MiB; divide the run"):
            kept.put("more", "x" * 2**19)
    assert pieces(file) == [0, 1, 2]
    file.write_bytes(b"x" * 2**21)
    with pytest.raises(AnalysisError, match="is larger than 1 MiB"):
        pieces(file)
