"""`Kept`: results held by their key, the ones used last, within a number of bytes; `Files`: what files hold."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

from headwater.lens.errors import RecordError
from headwater.lens.model import HookedModel

WALKED = ("headwater", "networkx")  # libraries whose objects are looked into


class Kept:
    """Results by key. Past `most` bytes the ones used longest ago go; the `least` newest stay, whatever they take."""

    def __init__(self, most: int, least: int = 1) -> None:
        self.most, self.least = most, least
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._found

    def get(self, key: Hashable) -> Any:
        """The result, which counts as used now; None where there is none."""
        with self._lock:
            if key not in self._found:
                return None
            self._found.move_to_end(key)
            return self._found[key][0]

    def put(self, key: Hashable, result: Any) -> None:
        size = size_of(result)
        with self._lock:
            self._found[key] = result, size
            self._found.move_to_end(key)
            while len(self._found) > self.least and self._bytes() > self.most:
                self._found.popitem(last=False)

    def bytes(self) -> int:
        """What all results take, by their arrays."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(size for _, size in self._found.values())


class Files:
    """What was read from files, read again where a file changed; as many as `Kept` keeps of it."""

    def __init__(self, most: int, least: int = 1) -> None:
        self._kept = Kept(most, least)
        self._lock = threading.Lock()

    def get(self, what: str, path: Path, read: Callable[[Path], Any]) -> tuple[tuple[int, int], Any]:
        """Size and time of the file, and what `read` gave. RecordError for one that is gone, with its name `what`."""
        with self._lock:
            try:
                about = path.stat()
            except OSError as error:
                raise RecordError(f"the {what} can not be read any more: {error.strerror}") from None
            state = about.st_size, about.st_mtime_ns
            known = self._kept.get(path)
            if known is None or known[0] != state:
                known = state, read(path)
                self._kept.put(path, known)
            return known


def size_of(result: Any) -> int:
    """Bytes of the arrays and texts in a result; what stands in it twice counts once. Models count nothing."""
    seen: dict[int, Any] = {}  # the objects too: the number of an object that is gone is given again
    left, size = [result], 0
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, HookedModel):
            continue
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            size += 0 if storage.data_ptr() in seen else storage.nbytes()
            seen[storage.data_ptr()] = storage
        elif isinstance(each, np.ndarray):
            size += each.nbytes
        elif isinstance(each, (pd.DataFrame, pd.Series, pd.Index)):
            size += int(np.sum(each.memory_usage(deep=True)))
        elif isinstance(each, (xr.DataArray, xr.Dataset)):
            size += each.nbytes + sum(place.nbytes for place in each.coords.values())
        elif isinstance(each, Mapping):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            left += each
        elif isinstance(each, (str, bytes)):
            size += sys.getsizeof(each)
        elif type(each).__module__.split(".")[0] in WALKED and not isinstance(each, type):
            left += vars(each).values() if hasattr(each, "__dict__") else ()
        elif dataclasses.is_dataclass(each) and not isinstance(each, type):
            left += [getattr(each, field.name, None) for field in dataclasses.fields(each)]
    return size
