"""Tile sizes, warps and pipeline stages of the two Triton kernels, by head width and type: a table, tuned by hand.

Chosen for Hopper from compiled code (registers, spills, shared memory; docs/kernels.md has the figures), not from
timings. No `@triton.autotune`: it needs a driver even to import, and the first call of every shape would pay for it.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """`own` rows (in K2: keys) belong to a program, which walks over keys (rows) `other` at a time."""

    own: int
    other: int
    warps: int
    stages: int


# by the head width rounded up to a power of two: (16-bit types, float32)
_ROWS = {
    16: (Config(128, 64, 4, 3), Config(64, 32, 4, 2)),
    32: (Config(128, 64, 4, 3), Config(64, 32, 4, 2)),
    64: (Config(128, 128, 8, 3), Config(64, 32, 4, 2)),
    128: (Config(128, 64, 8, 3), Config(32, 32, 8, 2)),
    256: (Config(128, 32, 8, 2), Config(16, 16, 8, 2)),
}
# with masses of groups, edited weights, or distances that are not linear in the key: registers for fewer keys at a time
_HEAVY = _ROWS | {width: (Config(128, 64, 8, 3), Config(64, 16, 4, 2)) for width in (16, 32, 64)}
# without values there is room for more rows of wide float32 heads
_AGAIN = _HEAVY | {128: (_HEAVY[128][0], Config(64, 16, 4, 2))}
# with a bias of queries and keys, whose tile is read along: fewer keys at a time, or its loads spill
_BIASED = {
    width: (Config(128 if width < 256 else 64, 32, 8, 2), float32) for width, (_, float32) in _ROWS.items()
}
_COLUMNS = {
    16: (Config(64, 128, 8, 3), Config(64, 64, 4, 2)),
    32: (Config(64, 128, 8, 3), Config(64, 64, 4, 2)),
    64: (Config(64, 128, 8, 3), Config(64, 64, 4, 2)),
    128: (Config(64, 128, 8, 3), Config(64, 32, 4, 2)),
    256: (Config(64, 64, 8, 2), Config(64, 16, 8, 2)),
}
# with values, K2 keeps weights in two parts in registers: fewer rows at a time
_SCATTER = {
    16: (Config(64, 64, 4, 3), Config(64, 32, 4, 2)),
    32: (Config(64, 64, 4, 3), Config(64, 32, 4, 2)),
    64: (Config(64, 64, 4, 3), Config(64, 32, 4, 2)),
    128: (Config(64, 64, 8, 3), Config(64, 16, 4, 2)),
    256: (Config(64, 32, 8, 2), Config(64, 16, 8, 2)),
}
_TABLES = {
    "rows": _ROWS,
    "heavy": _HEAVY,
    "again": _AGAIN,
    "biased": _BIASED,
    "columns": _COLUMNS,
    "scatter": _SCATTER,
}
# for GPUs whose programs have less shared memory than Hopper's: right everywhere, tuned nowhere
MODEST = Config(32, 16, 4, 1)
ENOUGH_SHARED = 200 * 1024  # bytes
# what the interpreter walks fastest
INTERPRETED = Config(64, 64, 4, 1)


def padded(width: int) -> int:
    """The power of two, 16 at least, that a width is padded to inside the kernels."""
    return max(16, 1 << (width - 1).bit_length())


def config(kernel: str, width: int, bits: int) -> Config:
    """The shipped tiles for a head width up to 256 and 16 or 32 bits a number.

    `kernel`: "rows" (K1), "heavy" (K1 that carries more), "again" (K1 over saved sums, without values), "biased" (K1
    with a bias of pairs), "columns" (K2) or "scatter" (K2 with values).
    """
    return _TABLES[kernel][padded(width)][0 if bits == 16 else 1]
