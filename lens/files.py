"""Files: read within limits, kept inside a folder, written whole or not at all.

A file that is read may come from a stranger, so its size is bounded, its JSON must be strict, and every fault is one
line that names the file and the mend. A file that is written has no name in its folder until it is whole (where the
file system can do that): a killed process leaves nothing behind, and a full disk leaves the old file as it was.
A `Fault` makes the error from its text, such as `ExperimentError`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where two runs of one file are not kept apart
    fcntl = None

Fault = Callable[[str], Exception]


def as_path(given: object, fault: Fault) -> Path:
    """What a caller gave as a path; refused where it can be no name of a file."""
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else b""
    if isinstance(text, str) and text and "\0" not in text:
        return Path(text)
    raise fault(f"a path is the name of a file, such as 'run.safetensors'; got {given!r:.60}")


def read_bytes(path: Path, most: int, fault: Fault, mend: str = "give a smaller one") -> bytes:
    """The content of a plain file of at most `most` bytes."""
    try:
        if path.exists() and not path.is_file():
            raise fault(f"{path} is not a plain file; give another path")
        with path.open("rb") as source:
            return bounded(source, str(path), most, fault, mend)
    except OSError as error:
        raise fault(f"{path} can not be read: {error.strerror or error}; give another path") from None
    except ValueError as error:  # a name that no file can have
        raise fault(f"{str(path)!r} can not be read: {error}; give another path") from None


def read_text(path: Path, most: int, fault: Fault, mend: str = "give a smaller one") -> str:
    """The text of a plain UTF-8 file of at most `most` bytes."""
    return as_text(read_bytes(path, most, fault, mend), str(path), fault)


def bounded(source: BinaryIO, name: str, most: int, fault: Fault, mend: str = "give a smaller one") -> bytes:
    """All of an open file or pipe; one that has more than `most` bytes is refused before it is read whole."""
    content = source.read(most + 1)
    if len(content) > most:
        raise fault(f"{name} is larger than {most / 2**20:g} MiB; {mend}")
    return content


def as_text(content: bytes, name: str, fault: Fault) -> str:
    """UTF-8 as text, without the byte order mark that some editors write."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fault(f"{name} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def parse_json(text: str, name: str, fault: Fault, finite: bool = True) -> Any:
    """Strict JSON: no key twice in one object; with `finite` no NaN, no Infinity, no number too large for a float."""
    only_finite: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_once, **only_finite)
    except json.JSONDecodeError as error:
        raise fault(f"{name}, line {error.lineno}, column {error.colno}: {error.msg}; give JSON") from None
    except (ValueError, RecursionError) as error:
        raise fault(f"{name} is not JSON that can be taken: {error}") from None


def within(folder: Path, name: str) -> Path | None:
    """The file or folder of that name in `folder`; None where it lies outside, also by a link."""
    if "\0" in name or Path(name).is_absolute():
        return None
    found = (folder / name).resolve()
    return found if found.is_relative_to(folder.resolve()) else None


def leads_below(name: str) -> bool:
    """Whether a name that a file gives can lie in that file's folder: no `..`, no other root, no sign that hides it."""
    paths = PurePosixPath(name), PureWindowsPath(name)
    outside = any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
    return name.isprintable() and not outside


def digest_of(content: Any) -> str:
    """sha256 of the canonical JSON of plain data."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str, fault: Fault) -> Path:
    """`write_bytes` of a text in UTF-8."""
    return write_bytes(path, text.encode(), fault)


def write_bytes(path: Path, content: bytes, fault: Fault) -> Path:
    """Write a file whole or not at all; the old file keeps its mode, and a link goes on pointing at it."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)  # a pipe or a terminal has no content that could be lost
            return path
        with NewFile(path, fault) as new:
            new.file.write(content)
            return new.finish()
    except OSError as error:
        raise unwritten(path, error, fault) from None


def check_target(path: Path, fault: Fault) -> Path:
    """Where a file of that name will lie, links followed; refused before any work is done for it."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise fault(f"can not write {path}: the folder {path.parent} does not exist")
    if target.is_dir():
        raise fault(f"can not write {path}: it is a folder; give a file name")
    if target.exists() and not os.access(target, os.W_OK):
        raise fault(f"can not write {path}: Permission denied; give another path")
    return target


def unwritten(path: Path, error: OSError, fault: Fault) -> Exception:
    """The error of a file that the system did not let us write."""
    return fault(f"can not write {path}: {error.strerror or error}; give another path")


class NewFile:
    """A file being written. `finish` gives it its name; leaving the `with` block before keeps the old file."""

    def __init__(self, path: Path, fault: Fault) -> None:
        self.path, self._fault = path, fault
        self._target = check_target(path, fault)
        if self._target.exists() and not self._target.is_file():
            raise fault(f"can not write {path}: it is no plain file; give a file name")
        self._beside: Path | None = None
        handle: int | None = None
        try:
            handle = self._nameless()
            if self._target.exists():
                os.chmod(handle, stat.S_IMODE(self._target.stat().st_mode))
            self.file: BinaryIO = os.fdopen(handle, "w+b")
        except OSError as error:
            if handle is not None:
                os.close(handle)
            self._drop()
            raise unwritten(path, error, fault) from None

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def finish(self) -> Path:
        """Bring the content to the disk and give the file its name in one step."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self._name()
        except OSError as error:
            raise unwritten(self.path, error, self._fault) from None
        finally:
            self.discard()
        return self.path

    def discard(self) -> None:
        """Drop what was written so far; after `finish` there is nothing to drop."""
        with contextlib.suppress(OSError):  # on a full disk what was not yet written can not be
            self.file.close()
        self._drop()

    def _drop(self) -> None:
        if self._beside is not None:
            with contextlib.suppress(OSError):  # where nothing could be written, nothing can be deleted
                self._beside.unlink(missing_ok=True)
            self._beside = None

    def _nameless(self) -> int:
        try:
            handle = os.open(self._target.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        except (OSError, AttributeError):  # not on this file system, or not on this system
            self._sweep()
            self._beside = self._free_name()
            handle = os.open(self._beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            hold(handle)
        return handle

    def _sweep(self) -> None:
        """Delete what killed processes left of this file; one that is being written is held by its process."""
        for left in self._target.parent.glob(f".{glob.escape(self._target.name[:50])}.*.part"):
            with contextlib.suppress(OSError), left.open("rb") as file:
                if hold(file.fileno()):
                    left.unlink()

    def _free_name(self) -> Path:
        return self._target.with_name(f".{self._target.name[:50]}.{secrets.token_hex(6)}.part")

    def _name(self) -> None:
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            if self._beside is None:
                beside = self._free_name()
                # with a folder's handle Python calls linkat, which follows /proc's link to the nameless file
                nameless = f"/proc/self/fd/{self.file.fileno()}"
                os.link(nameless, beside.name, src_dir_fd=folder, dst_dir_fd=folder)
                self._beside = beside
            os.replace(self._beside, self._target)
            self._beside = None
            os.fsync(folder)
        finally:
            os.close(folder)


def hold(handle: int) -> bool | None:
    """Lock a file until it is closed; False where another process has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def locked(path: Path, fault: Fault, name: Path | None = None, named: bool = False) -> FileIO:
    """The file, opened for reading and adding until it is closed; refused while another run has it.

    `name` is what the user calls it. With `named` the file's content says which run has it.
    """
    name = name or path
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise fault(f"{path} is a link or no plain file; give a file of its own")
    while True:
        try:
            handle = FileIO(path, "a+")
        except OSError as error:
            raise unwritten(name, error, fault) from None
        if hold(handle.fileno()) is False:
            with handle:
                handle.seek(0)
                by = handle.read(200).decode(errors="replace").strip() if named else ""
            raise fault(f"{name} is in use by {by or 'another run'}; wait for its end")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle
        handle.close()  # a run that came to its end deleted it after we had opened it


@contextlib.contextmanager
def alone(target: Path, fault: Fault) -> Iterator[None]:
    """Inside, a second run that asks for the same file is refused; `target` is that of `check_target`.

    A file that is replaced whole can not be locked itself: the lock is an empty file beside it. One that a killed
    process left holds nobody up.
    """
    beside = target.with_name(f".{target.name[:200]}.lock")
    with locked(beside, fault, target):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                beside.unlink()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number that JSON knows")


def _finite(text: str) -> float:
    if abs(value := float(text)) == float("inf"):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
