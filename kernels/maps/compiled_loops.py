"""The walk over a plain softmax map as one compiled loop nest: scores, weights and every statistic while they are near.

Four rows meet a strip of 512 keys at a time. Their scores are summed a few features at a time into 8 KB; one sweep over
each row then makes the weights and adds them to all that was asked for, the sums of the columns too. Nothing of a map's
size is written. Arithmetic is float32 within a strip and float64 from strip to strip. `numba` compiles them for the
processor at hand when they are first used, in some four seconds, and in two for each further set of statistics; nothing
is kept on the disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import __version__, config, njit, types
from numba.extending import intrinsic

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and without a compiler these loops take hours")

COMPILER = f"numba {__version__}"
ROWS = 4  # whose scores are made together
FEATURES = 4  # that are added to the scores together
STRIP = 512  # keys in hand
PIECE = 256  # rows that go through a strip before the next strip is fetched
# sums may be taken in another order and products joined to them, so that they fill vectors; NaN stays NaN
LOOSE = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True, "error_model": "numpy"}


# the arrays that a walk writes to, those first that are sums over a row
ROW = (
    "entropy", "distance", "distance_squared", "windowed_distance", "row_mass", "max", "self", "previous", "first",
)  # fmt: skip
SUMS, MAX, SELF, PREVIOUS, FIRST = 5, 5, 6, 7, 8


class Asked(NamedTuple):
    """What one compiled walk computes."""

    entropy: bool = False
    peak: bool = False
    row_mass: bool = False
    distance: bool = False
    distance_squared: bool = False
    windowed_distance: bool = False
    received: bool = False


def _exponential() -> list[np.float32]:
    """Coefficients of 2^r on -1/2 to 1/2, by Chebyshev interpolation; its relative error is 4e-9."""
    by_chebyshev = np.polynomial.chebyshev.chebinterpolate(lambda x: 2.0 ** (x / 2), 6)
    powers = np.polynomial.chebyshev.cheb2poly(by_chebyshev)
    return [np.float32(c) for c in powers * 2.0 ** np.arange(7)]


LN2 = np.log(2.0)
# views of any strides, so that nothing is compiled a second time
WALK = types.void(
    types.float32[:, :, :, :], types.float32[:, :, :, :], types.float32[:, :, :], types.int64[:, :],
    types.int64[:, :], types.int64, types.int64, types.int64, types.float32, types.float32,
    types.UniTuple(types.float32[:, :, :], len(ROW)), types.int64[:, :, :], types.float32[:, :, :],
)  # fmt: skip
C0, C1, C2, C3, C4, C5, C6 = _exponential()
ZERO, HALF = np.float32(0), np.float32(0.5)
LAST = np.float32(126)  # halvings after which a weight is 0: smaller ones are no normal float32
MOST = np.float32(127).view(np.int32)
NEVER = np.int32(2**31 - 1)
NONE, EXPONENT = np.int32(0), np.int32(23)
# indices without a sign: a signed one is looked at in every turn of a loop, as it may count from the end
U1, U2, U3 = (np.uint64(n * STRIP) for n in (1, 2, 3))


@intrinsic
def _bits(context: Any, x: Any) -> Any:
    def code(context, builder, signature, given):  # type: ignore[no-untyped-def]
        return builder.bitcast(given[0], context.get_value_type(types.int32))

    return types.int32(types.float32), code


@intrinsic
def _of_bits(context: Any, x: Any) -> Any:
    def code(context, builder, signature, given):  # type: ignore[no-untyped-def]
        return builder.bitcast(given[0], context.get_value_type(types.float32))

    return types.float32(types.int32), code


@njit(**LOOSE)
def _halvings(score, start, unit):
    """-log2 of a weight, 0 at least, as the bits of its float32, which are in the same order as whole numbers."""
    bits = _bits((start - score) * unit)
    return max(bits, NONE)


@njit(**LOOSE)
def _weight(bits):
    """2^-y and y, from the bits of y: the exponent is set by hand and a polynomial gives the rest."""
    y = _of_bits(min(bits, MOST))
    whole = np.int32(y + HALF)
    r = np.float32(whole) - y
    part = C0 + r * (C1 + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))))
    weight = _of_bits(np.int32(_bits(part) - np.int32(whole << EXPONENT)))
    return (weight if y < LAST else ZERO), y


@njit(**LOOSE)
def _add_products(q, rows, features, keys, base, scores, begin, end):
    """Add a few features' share of the scores of four rows; the first share replaces what was there."""
    r0, r1, r2, r3 = rows
    f0, f1, f2, f3 = features
    a00, a01, a02, a03 = q[r0, f0], q[r0, f1], q[r0, f2], q[r0, f3]
    a10, a11, a12, a13 = q[r1, f0], q[r1, f1], q[r1, f2], q[r1, f3]
    a20, a21, a22, a23 = q[r2, f0], q[r2, f1], q[r2, f2], q[r2, f3]
    a30, a31, a32, a33 = q[r3, f0], q[r3, f1], q[r3, f2], q[r3, f3]
    if f0 == 0:
        for j in range(begin, end):
            k0, k1, k2, k3 = keys[base + j], keys[base + U1 + j], keys[base + U2 + j], keys[base + U3 + j]
            scores[j] = a00 * k0 + a01 * k1 + a02 * k2 + a03 * k3
            scores[U1 + j] = a10 * k0 + a11 * k1 + a12 * k2 + a13 * k3
            scores[U2 + j] = a20 * k0 + a21 * k1 + a22 * k2 + a23 * k3
            scores[U3 + j] = a30 * k0 + a31 * k1 + a32 * k2 + a33 * k3
    else:
        for j in range(begin, end):
            k0, k1, k2, k3 = keys[base + j], keys[base + U1 + j], keys[base + U2 + j], keys[base + U3 + j]
            scores[j] += a00 * k0 + a01 * k1 + a02 * k2 + a03 * k3
            scores[U1 + j] += a10 * k0 + a11 * k1 + a12 * k2 + a13 * k3
            scores[U2 + j] += a20 * k0 + a21 * k1 + a22 * k2 + a23 * k3
            scores[U3 + j] += a30 * k0 + a31 * k1 + a32 * k2 + a33 * k3


@njit(**LOOSE)
def _pack(k, groups, packed):
    """Keys [key, d] as [strip, d, key of the strip], features rounded up with zeros."""
    keys, d = k.shape
    for first in range(0, keys, STRIP):
        count = min(STRIP, keys - first)
        for f in range(groups * FEATURES):
            at = (first // STRIP * groups * FEATURES + f) * STRIP
            for j in range(count):
                packed[at + j] = k[first + j, f] if f < d else ZERO


@njit(**LOOSE)
def _first_near(scores, at, begin, end, start, unit, least):
    """The first column of a strip whose halvings are `least`."""
    found = NEVER
    for j in range(begin, end):
        here = np.int32(j) if _halvings(scores[at + j], start, unit) <= least else NEVER
        found = min(found, here)
    return found if found != NEVER else np.int32(begin)


@njit(**LOOSE)
def _score(q, row, last, packed, strip, groups, scores, begin, end):
    """The scores of four rows from `row` on, of those up to `last`, with the keys of a strip."""
    d = q.shape[1]
    rows = (row, min(row + 1, last), min(row + 2, last), last)
    for g in range(groups):
        f = g * FEATURES
        features = (f, min(f + 1, d - 1), min(f + 2, d - 1), min(f + 3, d - 1))
        base = np.uint64(strip * groups * FEATURES + f * STRIP)
        _add_products(q, rows, features, packed, base, scores, np.uint64(begin), np.uint64(end))


@njit(**LOOSE)
def _one(scores, at, column, start, unit):
    """The weight in one column of a strip."""
    return _weight(_halvings(scores[at + np.uint64(column)], start, unit))[0]


@njit(**LOOSE)
def _span(low, high, first, last, keys):
    """The columns that some of the rows `first:last` see, as their bounds."""
    left, right = keys, 0
    for i in range(first, last):
        if low[i] < high[i]:
            left, right = min(left, low[i]), max(right, high[i])
    return left, right


@functools.cache
def walk_of(asked: Asked) -> Callable[..., None]:
    """The compiled walk over some rows of some maps that finds what is asked for.

    It is called with q [batch, head, query, d], k [batch, kv head, key, d], the log-sum-exp of the rows over the scale
    [batch, head, query], the columns that rows see [batch, query] as `low` and `high`, the first and the last row, the
    column of row 0's own position, scale * log2(e), the window of `windowed_distance`, and arrays to write to: those of
    `ROW` in their order, of no rows where they are not wanted, the columns of the largest weights, and [batch, head,
    key] to add the column sums to. A row that starts at infinity has no weights and is left out.
    """
    entropy, peak, row_mass, distance, distance_squared, windowed_distance, received = asked

    @njit(**LOOSE)
    def swept(scores, at, begin, end, start, unit, own, window, numbers, column):
        """One row of a strip: its least halvings and its sums. Its weights are added to `column`."""
        mass = spread = far = squared = windowed = ZERO
        least = NEVER
        for j in range(begin, end):
            bits = _halvings(scores[at + j], start, unit)
            weight, y = _weight(bits)
            if peak:
                least = min(least, bits)
            if row_mass:
                mass += weight
            if entropy:
                spread += weight * y
            if distance or distance_squared or windowed_distance:
                apart = abs(own - numbers[j])
                if distance:
                    far += weight * apart
                if distance_squared:
                    squared += weight * (apart * apart)
                if windowed_distance:
                    windowed += weight * min(apart, window)
            if received:
                column[j] += weight
        return least, (spread, far, squared, windowed, mass)

    @njit(WALK, **LOOSE)
    def walk(q, k, starts, low, high, first_row, last_row, shift, unit, window, found, argmax, total):
        keys, d = k.shape[2], k.shape[3]
        group, groups = q.shape[1] // k.shape[1], (d + FEATURES - 1) // FEATURES
        packed = np.empty((keys + STRIP - 1) // STRIP * groups * FEATURES * STRIP, np.float32)
        scores = np.empty(ROWS * STRIP, np.float32)
        column = np.zeros(STRIP, np.float32)
        numbers = np.arange(STRIP).astype(np.float32)
        sums, best = np.empty((PIECE, SUMS), np.float64), np.empty(PIECE, np.int32)
        for b in range(q.shape[0]):
            lows, highs = low[b], high[b]
            for h in range(q.shape[1]):
                if h % group == 0:
                    _pack(k[b, h // group], groups, packed)
                for top in range(first_row, last_row, PIECE):
                    bottom = min(top + PIECE, last_row)
                    sums[:], best[:] = 0.0, NEVER
                    left, right = _span(lows, highs, top, bottom, keys)
                    for strip in range(left // STRIP * STRIP, right, STRIP):
                        for four in range(top, bottom, ROWS):
                            last = min(four + ROWS, bottom)
                            left, right = _span(lows, highs, four, last, keys)
                            begin, end = max(left - strip, 0), min(right - strip, STRIP)
                            if begin < end:
                                _score(q[b, h], four, last - 1, packed, strip, groups, scores, begin, end)
                            for i in range(four, last):
                                begin, end = max(lows[i] - strip, 0), min(highs[i] - strip, STRIP)
                                start, n, at = starts[b, h, i], i - top, np.uint64((i - four) * STRIP)
                                if begin >= end or start == np.inf:
                                    continue
                                own = i + shift - strip
                                least, more = swept(
                                    scores, at, np.uint64(begin), np.uint64(end), start, unit, np.float32(own),
                                    window, numbers, column,
                                )  # fmt: skip
                                for s in range(SUMS):
                                    sums[n, s] += more[s]
                                if peak and least < best[n]:
                                    best[n] = least
                                    if argmax.size:
                                        argmax[b, h, i] = strip + _first_near(
                                            scores, at, np.uint64(begin), np.uint64(end), start, unit, least
                                        )
                                if found[SELF].size and begin <= own < end:
                                    found[SELF][b, h, i] = _one(scores, at, own, start, unit)
                                if found[PREVIOUS].size and begin <= own - 1 < end:
                                    found[PREVIOUS][b, h, i] = _one(scores, at, own - 1, start, unit)
                                if found[FIRST].size and strip <= lows[i]:
                                    found[FIRST][b, h, i] = _one(scores, at, begin, start, unit)
                        if received:
                            for j in range(min(STRIP, keys - strip)):
                                total[b, h, strip + j] += column[j]
                                column[j] = ZERO
                    for i in range(top, bottom):
                        for s in range(SUMS):
                            if found[s].size:
                                found[s][b, h, i] = sums[i - top, s] * (LN2 if s == 0 else 1.0)
                        if found[MAX].size and best[i - top] != NEVER:
                            found[MAX][b, h, i] = _weight(best[i - top])[0]

    return walk
