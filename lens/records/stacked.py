"""`Stacked`: a dict of statistics stored by layer, which stacks the layers of one when it is looked up."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor

from headwater.lens.records.open_file import OpenFile


class Stacked(MutableMapping[str, Tensor]):
    """{name: [batch, layer, …]}. Only statistics that are looked up are read from the file; results are not cached."""

    def __init__(self, parts: dict[str, list[Tensor]], file: OpenFile | None = None) -> None:
        self._parts, self._file = parts, file

    def layer(self, place: int) -> dict[str, Tensor]:
        """{name: [batch, …]} of one layer, by its index."""
        self._check()
        return {name: values[place] for name, values in self._parts.items()}

    def __getitem__(self, name: str) -> Tensor:
        self._check()
        return torch.stack(self._parts[name], 1)

    def __setitem__(self, name: str, values: Tensor) -> None:
        self._parts[name] = list(values.unbind(1))

    def __delitem__(self, name: str) -> None:
        del self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def _check(self) -> None:
        if self._file is not None:
            self._file.check()
