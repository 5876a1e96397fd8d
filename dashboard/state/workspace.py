"""What outlives a session and a restart: long texts, views too long for an address, pictures, records, saved runs.

Each lies in a folder of its kind under the digest of its content, so a name tells nothing of another's content and
the same content is kept once. The workspace is `headwater` in the user's data folder, or the folder that
HEADWATER_WORKSPACE names. Names come from addresses, that is from strangers: only digests are read.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import platformdirs

from headwater.lens.errors import HeadwaterError
from headwater.lens.files import NewFile, parse_json, read_bytes

FOLDER = "HEADWATER_WORKSPACE"  # environment variable: the folder to use in place of the user's
NAME = re.compile(r"[0-9a-f]{32}")
MOST_BYTES = {"texts": 2**20, "views": 2**20, "pictures": 2**24, "runs": 2**24, "records": 2**26}
MOST_IN_ALL = {"texts": 2**26, "views": 2**26, "pictures": 2**31, "runs": 2**31, "records": 2**31}
RECORD = "record:"  # before the digest of an uploaded record, where a model is named


def folder() -> Path:
    named = os.environ.get(FOLDER) or platformdirs.user_data_dir("headwater", appauthor=False)
    return Path(named).expanduser().absolute() / "workspace"


def keep(kind: str, content: bytes) -> str:
    """Keep content and give its name. HeadwaterError where it is too long or the folder can not be written."""
    if len(content) > MOST_BYTES[kind]:
        raise HeadwaterError(f"{len(content):,} bytes are more than the {MOST_BYTES[kind]:,} kept of {kind}")
    name = hashlib.sha256(content).hexdigest()[:32]
    path = folder() / kind / name
    if not path.is_file():
        _check_room(kind, len(content))
        try:
            folder().mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise HeadwaterError(
                f"{path.parent} can not be made: {error.strerror or error}; name another folder with {FOLDER}"
            ) from None
        with NewFile(path, HeadwaterError) as new:
            new.file.write(content)
            new.finish()
    return name


def place(kind: str, name: str) -> Path | None:
    """The file that is kept under a name; None where none is."""
    path = folder() / kind / name if NAME.fullmatch(name) else None
    return path if path is not None and path.is_file() else None


def kept(kind: str, name: str) -> bytes | None:
    """What is kept under a name; None where nothing is, or where it is not what the name says."""
    path = place(kind, name)
    if path is None:
        return None
    try:
        content = read_bytes(path, MOST_BYTES[kind], HeadwaterError)
    except HeadwaterError:
        return None
    return content if hashlib.sha256(content).hexdigest()[:32] == name else None


def _check_room(kind: str, size: int) -> None:
    held, most = sum(file.stat().st_size for file in (folder() / kind).glob("*")), MOST_IN_ALL[kind]
    if held + size > most:
        raise HeadwaterError(
            f"{held:,} bytes of {kind} are kept in {folder() / kind}, and no more than {most:,}; delete some there"
        )


def kept_json(kind: str, name: str) -> Any:
    """The same as data; None where it can not be read."""
    content = kept(kind, name)
    try:
        return (
            None if content is None else parse_json(content.decode("utf-8", "replace"), name, HeadwaterError)
        )
    except HeadwaterError:
        return None


def names(kind: str) -> list[str]:
    """All that is kept of a kind, the newest first."""
    found = folder() / kind
    files = [file for file in found.glob("*") if NAME.fullmatch(file.name)] if found.is_dir() else []
    return [file.name for file in sorted(files, key=lambda file: -file.stat().st_mtime)]


def remove(kind: str, name: str) -> None:
    """Forget what is kept under a name; nothing where nothing is."""
    if NAME.fullmatch(name):
        (folder() / kind / name).unlink(missing_ok=True)
