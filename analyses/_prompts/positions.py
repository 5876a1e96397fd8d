"""Token positions as users give them, converted to columns of a padded batch.

Positions count the real tokens of each batch row: 0 is the first real token and -1 the last, wherever the padding is. A
position therefore means the same token in a row of a batch and in the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.naming.grids import coordinates

Positions = Sequence[int] | int | Literal["all"]


class Labelled(Protocol):
    """A padded batch of texts, such as a record: tokens as text, and the mask of real tokens [batch, position].

    Those whose tokens may be patches have `grids` too, the pictures of each row.
    """

    @property
    def strings(self) -> list[list[str]]: ...

    @property
    def valid(self) -> Tensor: ...


def place_of(position: int, length: int, of: str, what: str = "position") -> int:
    """The position counted from the left. AnalysisError if `of`, a text of `length` tokens, is too short."""
    if not -length <= position < length:
        raise AnalysisError(
            f"{what}={position}, but {of} has {length} tokens; give a position from {-length} to {length - 1}"
        )
    return position % length


def columns_of(positions: Positions, valid: Tensor, what: str) -> Tensor:
    """Column of each asked position in each row of `valid` [batch, position]: int64 [batch, asked].

    "all" asks for every column, padding included; the caller blanks the padding. A row that is too short is
    an error.
    """
    rows, length = valid.shape
    if positions == "all":
        return torch.arange(length).expand(rows, length)
    asked = np.atleast_1d(positions).tolist()
    if not asked:
        raise AnalysisError(f"{what} is empty; give at least one token position, e.g. {what}=[-1]")
    counts = valid.sum(1)
    for row, count in enumerate(counts.tolist()):
        far = [p for p in asked if not -count <= p < count]
        if far:
            raise AnalysisError(
                f"{what} holds {', '.join(map(str, far))}, but batch row {row} has {count} tokens; "
                f"give positions from {-count} to {count - 1}"
            )
    # real tokens first, in their order: entry p of a row is the column of its p-th real token
    order = torch.argsort(~valid, dim=1, stable=True)
    index = torch.tensor(asked).expand(rows, -1)
    return order.gather(1, torch.where(index < 0, index + counts[:, None], index))


def position_coordinates(
    texts: Labelled,
    positions: Positions,
    columns: Tensor,
    keys: Positions = "all",
    key_columns: Tensor | None = None,
    key_texts: Labelled | None = None,
) -> dict[str, Any]:
    """Coordinates of a [batch, query, key] result: the asked positions, their columns and their tokens; all keys unless
    `keys` names some. `key_texts` holds the tokens that are looked at, where they are others than those that look."""
    key_texts = texts if key_texts is None else key_texts
    tokens, seen = (np.array(each.strings, dtype=object) for each in (texts, key_texts))
    if key_columns is None:
        key_columns = torch.arange(key_texts.valid.shape[1]).expand(len(columns), -1)
    return {
        **patch_coordinates(texts, "query", columns),
        **patch_coordinates(key_texts, "key", key_columns),
        "batch": np.arange(len(columns)),
        "query": _named(positions, columns),
        "key": _named(keys, key_columns),
        "position": (("batch", "query"), columns.numpy()),
        "query_token": (("batch", "query"), np.take_along_axis(tokens, columns.numpy(), 1).astype(str)),
        "key_token": (("batch", "key"), np.take_along_axis(seen, key_columns.numpy(), 1).astype(str)),
    }


def patch_coordinates(texts: Labelled, axis: str, columns: Tensor) -> dict[str, Any]:
    """Image, frame, row and column of each token, where some are patches; -1 for a token that is none."""
    return coordinates(getattr(texts, "grids", ()), axis, columns, texts.valid.shape[1])


def _named(positions: Positions, columns: Tensor) -> Any:
    return np.arange(columns.shape[1]) if isinstance(positions, str) else np.atleast_1d(positions)
