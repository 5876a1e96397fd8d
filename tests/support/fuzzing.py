"""Files changed at random, and what may come of them: an answer or one line, within bounds of time and memory.

`HEADWATER_FUZZ_SECONDS` says how long each kind of file is tried, `HEADWATER_FUZZ_SEED` where chance begins. An input
that does anything else is kept in tests/fuzz/found and tried again by every run of the tests.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.lens.errors import HeadwaterError

FOUND = Path(__file__).parents[1] / "fuzz" / "found"
SECONDS = float(os.environ.get("HEADWATER_FUZZ_SECONDS", "2"))
# a usual run tries the same inputs on a fast machine as on a slow one, or fewer
MOST_TRIED = None if "HEADWATER_FUZZ_SECONDS" in os.environ else 60
SEED = int(os.environ.get("HEADWATER_FUZZ_SEED", "0"))
CLEAR = Path("/proc/self/clear_refs")
MOST_SECONDS, MOST_GROWTH, LONGEST = 20, 2**30, 2000  # of one input; bytes of memory; characters of its line
IDLE = 10  # times as many seconds may pass, since others may keep the processor busy
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 1.5, -0.0, 1e30, 1e999, float("nan"), 2**18, 2**31, 2**63, 10**40, "", "x", "../x",
    "/etc/passwd", "a\0b", "\ud800", "‮", "é" * 3000, [], {}, [[]], {"a": 1}, [0] * 3000, "nan", "1", "None",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A kind of file: whole ones, how one is changed, and what reads it."""

    ending: str
    whole: Sequence[bytes]
    change: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], object]


def tried(name: str, target: Target, folder: Path, seconds: float = SECONDS) -> int:
    """How many changed files were read in that time; the first that does what it must not fails the test."""
    chance, end, count = random.Random(f"{SEED} {name}"), time.monotonic() + seconds, 0
    path = folder / f"input{target.ending}"
    while time.monotonic() < end and count != MOST_TRIED:
        content = target.change(chance, chance.choice(target.whole))
        path.write_bytes(content)
        if fault := fault_of(target, path):
            kept = FOUND / name / (hashlib.sha256(content).hexdigest()[:12] + target.ending)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
            raise AssertionError(f"{fault}; the input is kept as {kept}")
        count += 1
    return count


def found(name: str) -> list[Path]:
    """The inputs that were once found to do what they must not."""
    return sorted((FOUND / name).glob("*")) if (FOUND / name).is_dir() else []


def fault_of(target: Target, path: Path) -> str:
    """What reading a file does that it must not; empty where it gives an answer, or one line."""
    CLEAR.write_text("5")  # the peak starts anew, so that an input can not hide behind an earlier one
    before, begun = peak(), time.process_time()
    try:
        with at_most(MOST_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
    except TooLong as error:
        return f"it takes {error}"
    except HeadwaterError as error:
        if "\n" in str(error) or len(str(error)) > LONGEST:
            return f"{type(error).__name__} is not one line: {error!r:.300}"
    except Exception as error:
        places = " < ".join(
            f"{each.filename.rpartition('/')[2]}:{each.lineno}"
            for each in traceback.extract_tb(error.__traceback__)[-4:]
        )
        return f"{type(error).__name__}: {error!s:.300} ({places})"
    if (grown := peak() - before) > MOST_GROWTH:
        return f"it takes {grown // 2**20} MiB"
    if (taken := time.process_time() - begun) > MOST_SECONDS:
        return f"it takes {taken:.0f} s"
    return ""


class TooLong(BaseException):
    """No Exception, so that nothing that is tried takes it for its own."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TooLong inside of what takes more seconds of the processor, or `IDLE` times as many of the clock."""

    def over(*_: object) -> None:
        raise TooLong(f"more than {seconds} s")

    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, 1), signal.SIGALRM: (signal.ITIMER_REAL, IDLE)}
    earlier = {sign: signal.signal(sign, over) for sign in clocks}
    for clock, times in clocks.values():
        signal.setitimer(clock, seconds * times)
    try:
        yield
    finally:
        for sign, (clock, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(sign, earlier[sign])


def peak() -> int:
    """The most memory that this process has had since `CLEAR` was written to, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def bytes_changed(chance: random.Random, content: bytes) -> bytes:
    """Bits flipped, bytes cut out, put in, doubled or moved; up to four of these."""
    held = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(held) + 1)
        end = min(len(held), at + chance.choice((1, 2, 8, 64, 4096)))
        kind = chance.randrange(6)
        if kind == 0 and at < len(held):
            held[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del held[at:end]
        elif kind == 2:
            held[at:at] = chance.randbytes(end - at)
        elif kind == 3:
            held[at:at] = held[at:end]
        elif kind == 4:
            held[at:end] = chance.choice((b"\0", b"\xff", b"9", b"[")) * (end - at)
        else:
            del held[at:]
    return bytes(held)


def header_changed(chance: random.Random, content: bytes) -> bytes:
    """Bytes changed, or the header by somebody who knows the format."""
    if chance.random() < 0.5:
        return bytes_changed(chance, content)
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    told = json.loads(head["__metadata__"]["headwater"])
    told.pop("digests", None)  # else the digest of the header alone refuses it
    head["__metadata__"] = {"headwater": json.dumps(data_changed(chance, told))}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def json_changed(chance: random.Random, content: bytes) -> bytes:
    """Values of another kind, keys that are lacking, doubled or unknown, at any depth; sometimes bytes of it."""
    if chance.random() < 0.2:
        return bytes_changed(chance, content)
    text = json.dumps(data_changed(chance, json.loads(content)), ensure_ascii=chance.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def data_changed(chance: random.Random, data: Any) -> Any:
    """Plain data with one to three values changed."""
    whole = [copy.deepcopy(data)]
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(_places(whole)))
        kind = chance.randrange(8)
        if kind < 3:
            holder[key] = copy.deepcopy(chance.choice(ODD))
        elif kind == 3 and holder is not whole:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[chance.choice((key + "x", "", "é", "__class__", "a" * 3000))] = holder.pop(key)
        elif kind == 4 or kind == 5:
            other, there = chance.choice(list(_places(whole)))
            holder[key] = copy.deepcopy(other[there])
        elif kind == 6 and isinstance(holder[key], int | float):
            holder[key] = chance.choice((-1, 2, 0.5, 10**6)) * holder[key] + chance.choice((-1, 0, 1))
        elif isinstance(holder[key], list):
            holder[key] = holder[key] * chance.choice((0, 2, 3))
        else:
            holder[key] = [holder[key]]
    return whole[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value))[:50]
    for key, each in inside:
        yield value, key
        if isinstance(each, dict | list):
            yield from _places(each)
