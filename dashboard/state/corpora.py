"""Corpora that the dashboard was started with: files of results, which no address names by their path."""

from __future__ import annotations

import threading
from pathlib import Path

import headwater as hw
from headwater.lens.errors import RecordError

MOST_HELD = 4
_given: dict[str, Path] = {}
_held: dict[str, tuple[tuple[int, int], hw.Corpus]] = {}
_lock = threading.Lock()


def is_one(given: str) -> bool:
    """Whether what the dashboard is to open is the result of `headwater corpus`."""
    from headwater.analyses._corpora.saved import is_corpus  # it brings torch, which the menu does not need

    path = Path(given).expanduser()
    return path.is_file() and is_corpus(path)


def offer(given: str) -> str:
    """Offer a result under the name of its file, after it was read; RecordError for a file that is damaged."""
    path = Path(given).expanduser().resolve()
    name = path.name
    if _given.get(name, path) != path:
        name = f"{path.parent.name}/{name}"
    hw.Corpus.open(path, verify=True)
    _given[name] = path
    return name


def offered() -> list[str]:
    return list(_given)


def corpus(name: str) -> hw.Corpus:
    """The result of that name, read again where its file changed; RecordError where it is gone."""
    path = _given[name]
    with _lock:
        try:
            about = path.stat()
        except OSError as error:
            raise RecordError(f"the corpus {name[:40]} can not be read any more: {error.strerror}") from None
        key = about.st_size, about.st_mtime_ns
        if name not in _held or _held[name][0] != key:
            if len(_held) >= MOST_HELD:
                _held.pop(next(iter(_held)))
            _held[name] = key, hw.Corpus.open(path)
        return _held[name][1]
