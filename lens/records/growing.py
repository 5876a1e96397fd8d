"""`Rows`: a tensor that grows along one axis, in memory or in a temporary file."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from headwater.lens.errors import RecordError


class Rows:
    """A tensor [batch, …, position, …]; with a folder it is in a temporary file of its own."""

    def __init__(self, axis: int, folder: Path | None) -> None:
        self._axis = axis
        self._pieces: list[Tensor] = []
        self._folder = folder
        self._file: BinaryIO | None = None
        self._like: Tensor | None = None
        self.length = 0

    def append(self, piece: Tensor) -> None:
        self.length += piece.shape[self._axis]
        if self._folder is None:
            self._pieces.append(piece.detach().clone())
            return
        rows = piece.detach().cpu().movedim(self._axis, 0).contiguous()
        self._like = rows[:0]
        with self._room():
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by `close`
            self._file.write(rows.reshape(-1).view(torch.uint8).numpy().tobytes())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk the last rows can not be written
                self._file.close()

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """RecordError where the system does not let us write, as on a full disk."""
        try:
            yield
        except OSError as error:
            raise RecordError(
                f"can not write in {self._folder}: {error.strerror or error}; give path= on another disk"
            ) from None

    def joined(self) -> Tensor:
        """The whole tensor; a file is memory-mapped and copied once."""
        if self._file is None:
            return torch.cat(self._pieces, self._axis)
        assert self._like is not None
        with self._room():
            self._file.flush()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            rows = torch.frombuffer(mapped, dtype=self._like.dtype)
            found = (
                rows.view(self.length, *self._like.shape[1:])
                .movedim(0, self._axis)
                .clone(memory_format=torch.contiguous_format)
            )
            del rows
        self.close()
        return found
