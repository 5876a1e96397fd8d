"""Corpora that the dashboard was started with: files of results, which no address names by their path."""

from __future__ import annotations

from pathlib import Path

import headwater as hw
from headwater.dashboard.state.kept import Files

_given: dict[str, Path] = {}
_held = Files(2**28)


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
    return _held.get(f"corpus {name[:40]}", _given[name], hw.Corpus.open)[1]
