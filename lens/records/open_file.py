"""Files that are open for long: `OpenFile` knows one by its size and time, `FromFile` looks before each access.

A record is memory-mapped, so a page of a file that was cut short ends the process (SIGBUS), and one that was written
over gives other numbers in silence. A file that is renamed over the old one does no harm: the old one stays mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from headwater.lens.errors import RecordError

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class OpenFile:
    """The file that was opened; `state` is its device, inode, size and time of change."""

    path: Path
    state: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: Path) -> OpenFile:
        path = path.absolute()
        return cls(path, _state(path))

    def check(self) -> None:
        """RecordError if the file was changed in place. One that was moved, deleted or replaced is still the same."""
        try:
            now = _state(self.path)
        except OSError:
            return
        if now[:2] == self.state[:2] and now[2:] != self.state[2:]:
            raise RecordError(f"{self.path} was changed while it is open; open it again")


class FromFile(Mapping[Key, Value]):
    """A mapping whose tensors lie in a file, which is checked before each access."""

    def __init__(self, content: dict[Key, Value], file: OpenFile) -> None:
        self._content, self._file = content, file

    def __getitem__(self, key: Key) -> Value:
        self._file.check()
        return self._content[key]

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[Key]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


def watched(content: dict[Key, Value], file: OpenFile | None) -> Mapping[Key, Value]:
    """The mapping, checked before each access where it lies in a file."""
    return content if file is None else FromFile(content, file)


def _state(path: Path) -> tuple[int, int, int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
