"""`RecordFile`: a safetensors file written tensor by tensor; `read` memory-maps it.

The header comes first in the file but is known last. So space is reserved for it, and the rest of the space is filled
with blanks, which the format allows. The file gets its name only when it is complete (`NewFile`). The header holds a
digest of every tensor, and one of itself. Cost: one pass over the data, with the digest; memory: one tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from headwater.lens.errors import RecordError
from headwater.lens.files import NewFile, parse_json, unwritten

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
ALIGNED = 8
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
META = "headwater"


class RecordFile:
    """A file being written. Without `finish`, the end of its `with` block leaves the old file as it was.

    `room` is the number of bytes reserved for the header; if that is too few the data is copied once.
    """

    def __init__(self, path: Path, room: int = 0) -> None:
        try:
            _as_utf8(path)
        except UnicodeDecodeError:
            raise RecordError(
                f"can not write {path}: its name is no UTF-8, so that no reader opens it; give another name"
            ) from None
        self.path = path
        self.table: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}
        self._room = _aligned(room)
        self._size = 0
        self._new = NewFile(path, RecordError)
        self._new.file.seek(8 + self._room)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; the caller may free it afterwards."""
        if name in self.table:
            raise ValueError(f"tensor {name!r} is in the file already")
        kind = DTYPES[tensor.dtype]
        plain = tensor.detach().cpu().contiguous()
        data = _bytes(plain)
        self._align(f"pad.{len(self.table)}")
        self._write(name, kind, list(plain.shape), data)

    def finish(self, header: dict[str, Any]) -> Path:
        """Write the header and give the file its name."""
        head = self._head(json.dumps({**header, "digests": self.digests}))
        try:
            if len(head) > self._room:
                self._move(_aligned(len(head)))
            self._new.file.seek(0)
            self._new.file.write(self._room.to_bytes(8, "little") + head.ljust(self._room))
        except OSError as error:
            self.discard()
            raise unwritten(self.path, error, RecordError) from None
        return self._new.finish()

    def discard(self) -> None:
        """Delete what was written so far; no effect after `finish`."""
        self._new.discard()

    def _write(self, name: str, kind: str, shape: list[int], data: memoryview) -> None:
        try:
            self._new.file.write(data)
        except OSError as error:
            raise unwritten(self.path, error, RecordError) from None
        self.digests[name] = hashlib.blake2b(data, digest_size=16).hexdigest()
        end = self._size + data.nbytes
        self.table[name] = {"dtype": kind, "shape": shape, "data_offsets": [self._size, end]}
        self._size = end

    def _align(self, name: str) -> None:
        """Pad with a tensor of zeros: readers map tensors in place, so each must begin at a multiple of 8 bytes."""
        if lacking := -self._size % ALIGNED:
            self._write(name, "U8", [lacking], memoryview(bytes(lacking)))

    def _head(self, text: str) -> bytes:
        metadata = {META: text, f"{META}_digest": _digest(text, self.table)}
        head = json.dumps({"__metadata__": metadata, **self.table}, separators=(",", ":")).encode()
        if len(head) > LARGEST_HEADER:
            raise RecordError(
                f"can not write {self.path}: its header would have {len(head)} bytes, readers take {LARGEST_HEADER}; "
                "record fewer layers at a time"
            )
        return head

    def _move(self, room: int) -> None:
        """Copy the data to leave more room for the header."""
        with self._new as old:
            self._new = NewFile(self.path, RecordError)
            self._new.file.seek(8 + room)
            old.file.seek(8 + self._room)
            shutil.copyfileobj(old.file, self._new.file, 2**20)
        self._room = room


def read(path: Path, verify: bool = False, mapped: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors, memory-mapped or read; ValueError or SafetensorError for a damaged file.

    `verify` reads every tensor and compares its digest; without it only the digest of the header is checked.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if META not in metadata:
            raise RecordError(
                f"{path} is a safetensors file but not a Headwater record; open a file that record.save wrote"
            )
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        table = {n: {"dtype": s.get_dtype(), "shape": list(s.get_shape())} for n, s in slices.items()}
        text = metadata[META]
        header = parse_json(text, f"{path}: the header", RecordError)
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        if "digests" in header and metadata.get(f"{META}_digest") != _digest(text, table):
            raise ValueError("the header is not the one that was written")
        tensors = {name: file.get_tensor(name) for name in names}
        if not mapped:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if verify:
        _verify(tensors, header.get("digests", {}))
    return header, {name: tensor for name, tensor in tensors.items() if not name.startswith("pad.")}


def _as_utf8(path: Path) -> str:
    """The name by its bytes, whatever the locale; UnicodeDecodeError where they are no UTF-8."""
    return os.fsencode(path).decode("utf-8")


def _verify(tensors: dict[str, Tensor], digests: dict[str, str]) -> None:
    for name, tensor in tensors.items():
        if hashlib.blake2b(_bytes(tensor.contiguous()), digest_size=16).hexdigest() != digests.get(name):
            raise ValueError(f"the tensor {name} is not the one that was written")


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    plain: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(plain)


def _digest(text: str, table: dict[str, dict[str, Any]]) -> str:
    """A digest of the header text and of each tensor's name, dtype and shape, but not of the offsets."""
    shapes = sorted((n, t["dtype"], list(t["shape"])) for n, t in table.items())
    return hashlib.sha256(f"{text}\n{json.dumps(shapes)}".encode()).hexdigest()


def _aligned(size: int) -> int:
    return size + -size % ALIGNED
