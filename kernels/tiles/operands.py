"""What a map is multiplied with and cut by: operands with the axes they lack, slices without a step."""

from __future__ import annotations

from torch import Tensor


def operand(x: Tensor, shape: tuple[int, int, int, int], axis: str) -> Tensor:
    """x as [batch, head or 1, length, c] for a map [batch, head, query, key]; an error states the shapes that fit.

    `axis` is the one that is summed over, "query" or "key".
    """
    batch, heads, length = shape[0], shape[1], shape[2 if axis == "query" else 3]
    full = x[None, None] if x.dim() == 2 else x[:, None] if x.dim() == 3 else x
    fits = full.dim() == 4 and full.shape[2] == length
    if not fits or full.shape[0] not in (1, batch) or full.shape[1] not in (1, heads):
        raise ValueError(
            f"the operand must be [{axis}, c], [batch, {axis}, c] or [batch, head, {axis}, c] with "
            f"batch={batch}, head={heads}, {axis}={length}; got {tuple(x.shape)}"
        )
    return full.expand(batch, -1, -1, -1)


def plain(given: slice, length: int, name: str) -> slice:
    """The slice within a length; ValueError for one with a step."""
    begin, end, step = given.indices(length)
    if step != 1:
        raise ValueError(f"{name} must be a slice without a step, got {given}")
    return slice(begin, max(begin, end))
