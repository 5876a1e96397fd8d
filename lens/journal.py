"""The finished pieces of a run in a file, so that a run that was stopped goes on where it stood.

The file is text: a line of JSON for each piece, with a checksum, on the disk before the next piece begins. Lines are
only added, so a process that is killed loses at most the piece it was working on; a line that it left unfinished does
not count. The first line says which run the pieces are of. One process at a time has the file. Numbers are written so
that reading gives the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.lens.errors import as_short
from headwater.lens.files import Fault, as_path, locked, unwritten

FORMAT = 1
MOST_BYTES = 2**30
HEAD = "run"


class _File:
    """The open file; `size` is where its last whole line ends."""

    def __init__(self, path: Path, fault: Fault) -> None:
        self.path, self.fault = path, fault
        self._handle = locked(path, fault)
        self.size = 0

    def read(self) -> bytes:
        if os.fstat(self._handle.fileno()).st_size > MOST_BYTES:
            raise self.fault(f"{self.path} is larger than {MOST_BYTES // 2**20} MiB; give another file")
        self._handle.seek(0)
        return self._handle.read()

    def add(self, line: bytes) -> None:
        if self.size + len(line) > MOST_BYTES:
            raise self.fault(f"{self.path} would be larger than {MOST_BYTES // 2**20} MiB; divide the run")
        try:
            self._handle.truncate(self.size)  # a line that was left unfinished
            left = memoryview(line)
            while left:
                left = left[self._handle.write(left) :]
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise unwritten(self.path, error, self.fault) from None
        self.size += len(line)

    def close(self) -> None:
        self._handle.close()


class Journal:
    """Finished pieces by name. Without a file it remembers them for as long as it lives."""

    def __init__(self, pieces: dict[str, Any], file: _File | None = None) -> None:
        self._pieces = pieces
        self._file = file
        self.path = None if file is None else file.path

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, path: str | Path | None, run: Mapping[str, Any], fault: Fault, *, anew: bool = False
    ) -> Iterator[Journal]:  # fmt: skip
        """The journal of a run that `run`, plain data, tells from every other; None keeps no file.

        A file of another run, or with a line that was changed, is refused; with `anew` what can not be used of it is
        measured again.
        """
        if path is None:
            yield cls({})
            return
        wanted = {"format": FORMAT, **json.loads(json.dumps(run, default=str))}
        head = _line(HEAD, wanted)
        with contextlib.closing(_File(as_path(path, fault), fault)) as file:
            content = file.read()
            pieces: dict[str, Any] = {}
            if not head.startswith(content):  # else it is new, or was cut short in its first line
                pieces, size, wrong = _read(content)
                wrong = wrong or _differing(pieces[HEAD], wanted)
                if wrong and not anew:
                    raise fault(f"{path} {wrong}")
                pieces, file.size = (pieces, size) if pieces.get(HEAD) == wanted else ({}, 0)
            if not pieces:
                file.add(head)
            yield cls(pieces, file)

    def get(self, name: str) -> Any:
        """A piece, or None where it is not finished."""
        return self._pieces.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a finished piece, plain data."""
        self._pieces[name] = value
        if self._file is not None:
            self._file.add(_line(name, value))


def _line(name: str, value: Any) -> bytes:
    text = json.dumps([name, value])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({"piece": text, "sha256": digest}) + "\n").encode()


def _read(content: bytes) -> tuple[dict[str, Any], int, str]:
    """The pieces up to the first line that is none, where that line begins, and what is wrong with it."""
    *whole, _ = content.split(b"\n")
    pieces: dict[str, Any] = {}
    size = 0
    for number, line in enumerate(whole, 1):
        try:
            name, value = _piece(json.loads(line))
            if number == 1 and (name != HEAD or not isinstance(value, dict)):
                raise ValueError("no first line")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            what = "is no file of finished pieces" if number == 1 else f"was changed in line {number}"
            return pieces, size, f"{what}; delete it or give another name"
        pieces[name] = value
        size += len(line) + 1
    return pieces, size, "" if whole else "is no file of finished pieces; delete it or give another name"


def _piece(found: Any) -> tuple[str, Any]:
    if hashlib.sha256(found["piece"].encode()).hexdigest() != found["sha256"]:
        raise ValueError("another digest")
    name, value = json.loads(found["piece"])
    return name, value


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if not differing:
        return ""
    there, here = as_short(found.get(differing[0])), as_short(wanted.get(differing[0]))
    return (
        f"is of another run ({differing[0]} is {there} there and {here} here); give another file, or the settings it "
        "began with"
    )
