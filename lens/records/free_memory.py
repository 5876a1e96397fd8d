"""`free_memory`: the bytes that this process may still take, by the machine and by every control group around it.

Containers and batch systems limit a process by its control group, of which the machine's own figures say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from headwater.lens.errors import ResourceError

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NO_LIMIT = 2**60  # version 1 writes a number near 2⁶³ where there is none


def free_memory() -> int:
    """In bytes; files that the system keeps in memory count as free."""
    try:
        return max(
            0, min([int(psutil.virtual_memory().available), *_group_room(ROOT, OWN), *_process_room()])
        )
    except OSError as error:  # such as no file handle being left
        why = error.strerror or error
        raise ResourceError(
            f"how much memory is free can not be read: {why}; close files (ulimit -n)"
        ) from None


def _group_room(root: Path, own: Path) -> Iterator[int]:
    """What each control group leaves, from this process's own up to the root; version 2, then version 1."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            yield from _upwards(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _upwards(root / "memory", path, *names)


def _upwards(top: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    # inside of a container the group's own folder is mounted at the top, and `path` is not below it
    place = top / path.lstrip("/")
    for folder in (place, *place.parents):
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None and most < NO_LIMIT:
            yield most - used + _counted(folder / "memory.stat", cached)
        if folder == top:
            return


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _counted(file: Path, name: str) -> int:
    try:
        found = dict(line.split() for line in file.read_text().splitlines())
        return int(found.get(name, 0))
    except (OSError, ValueError):
        return 0


def _process_room() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, name in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            used = psutil.Process().memory_info()
            yield most - getattr(used, name, used.rss)
