"""Finished pieces of a long run in a file, so that a run that was stopped goes on where it stood.

The file is text: a line of JSON for each piece, with a checksum, on the disk before the next piece begins. A line that
was cut short when the process ended does not count; one that was changed since is refused, and so is the file of
another run, whose first line says what it is of. Numbers are written so that reading gives the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from headwater.lens.errors import AnalysisError

FORMAT = 1
MOST_BYTES = 2**28
HEAD = "run"


class Journal:
    """Pieces by name. Without a file it remembers them for as long as it lives."""

    def __init__(self, pieces: dict[str, Any], path: Path | None = None, file: TextIO | None = None) -> None:
        self._pieces = pieces
        self.path = path
        self._file = file

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | Path | None, run: Mapping[str, Any]) -> Iterator[Journal]:
        """The journal of a run that `run`, plain data, tells from every other; None keeps no file."""
        if path is None:
            yield cls({})
            return
        path = Path(path)
        wanted = {"format": FORMAT, **json.loads(json.dumps(run, default=str))}
        pieces = _read(path)
        _same(path, pieces.setdefault(HEAD, wanted), wanted)
        file = _begun(path, pieces)
        try:
            yield cls(pieces, path, file)
        finally:
            file.close()

    def get(self, name: str) -> Any:
        """A piece, or None where it is not finished."""
        return self._pieces.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a finished piece, plain data."""
        self._pieces[name] = value
        if self._file is not None:
            try:
                self._file.write(_line(name, value))
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise _unwritten(self.path, error) from None


def _begun(path: Path, pieces: Mapping[str, Any]) -> TextIO:
    """The file with whole lines alone, open for more; it was written beside and renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for name, value in pieces.items():
                file.write(_line(name, value))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise _unwritten(path, error) from None
    finally:
        beside.unlink(missing_ok=True)


def _unwritten(path: Path | None, error: OSError) -> AnalysisError:
    return AnalysisError(f"resume: can not write {path}: {error.strerror or error}; give another file")


def _line(name: str, value: Any) -> str:
    text = json.dumps([name, value])
    return json.dumps({"piece": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """Every whole line of a file; nothing where there is none."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise AnalysisError(f"resume: {path} is a link or no plain file; give a file of its own")
    try:
        if path.exists() and path.stat().st_size > MOST_BYTES:
            raise AnalysisError(f"resume: {path} is larger than {MOST_BYTES // 2**20} MiB; give another file")
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise AnalysisError(f"resume: can not read {path}: {error.strerror or error}") from None
    *whole, _ = content.split(b"\n")
    if content and not whole:
        raise AnalysisError(f"resume: {path} is no file of finished pieces; give another name")
    pieces: dict[str, Any] = {}
    for number, line in enumerate(whole, 1):
        try:
            found = json.loads(line)
            text = found["piece"]
            if hashlib.sha256(text.encode()).hexdigest() != found["sha256"]:
                raise ValueError
            name, value = json.loads(text)
            if number == 1 and (name != HEAD or not isinstance(value, dict)):
                raise ValueError
            pieces[name] = value
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            what = "is no file of finished pieces" if number == 1 else f"was changed in line {number}"
            raise AnalysisError(f"resume: {path} {what}; delete it or give another name") from None
    return pieces


def _same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        raise AnalysisError(
            f"resume: {path} is of another run ({key} is {_short(found.get(key))} there and {_short(wanted.get(key))} "
            "here); give another file, or the settings it began with"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
