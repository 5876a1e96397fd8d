"""The walk over plain softmax maps as one compiled loop nest: output, log-sum-exp and every statistic from one look.

Some rows meet a strip of 512 keys at a time, and their weights of all strips stay in a buffer of the nearest caches. A
strip's scores become weights relative to the largest score so far in one sweep, which also makes the sums that were
asked for; values are multiplied with them while they are near. When a row has met its last strip its sum is known, and
column sums are taken from the buffer with one factor per row and strip. Nothing of a map's size is written. Arithmetic
is float32 within a strip and float64 from strip to strip. `numba` compiles the walk when it is first used, in some four
seconds, and in two for each further set of statistics; nothing is kept on the disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit, types

from headwater.kernels.compiled.arithmetic import C0, LOOSE, ROWS, WIDE, ZERO, largest, products, weighed

STRIP = 512  # keys in hand
PIECE = 32  # rows whose weights are kept until their sums are known
APART = 80  # more columns of the buffer, so that its rows do not fall upon the same places of a cache
FOUR = 4  # rows whose weights are added to column sums together
# the arrays that a walk writes to
ROW = (
    "entropy", "distance", "distance_squared", "windowed_distance", "row_mass", "max", "self", "previous", "first",
)  # fmt: skip
ENTROPY, FAR, SQUARED, WINDOWED, ROW_MASS, MAX, SELF, PREVIOUS, FIRST = range(len(ROW))
MASS = 4  # the sum of weights among the sums; those before it stand as in `ROW`
SUMS = 5
NEVER = np.int32(2**31 - 1)
LN2 = np.log(2.0)


class Asked(NamedTuple):
    """What one compiled walk computes beside the largest weights and single ones."""

    entropy: bool = False
    distance: bool = False
    distance_squared: bool = False
    windowed_distance: bool = False
    received: bool = False


# views of any strides, so that nothing is compiled a second time
WALK = types.void(
    types.float32[:, :, :], types.float32[::1], types.float32[::1], types.int64, types.int64, types.float32[:, :],
    types.float32[:, :], types.boolean[:], types.int64[:], types.int64[:], types.int64, types.int64, types.int64,
    types.float64, types.float32, types.UniTuple(types.float32[:, :], len(ROW)), types.int64[:, :],
    types.float32[:, :], types.float32[:, :, :], types.float32[:, :],
)  # fmt: skip


@njit(**LOOSE)
def _first_at_least(e, at, begin, end, least):
    """The first place from `at` on, within `begin:end`, of a weight that is `least` or more."""
    found = NEVER
    for j in range(begin, end):
        found = min(found, np.int32(j) if e[at + j] >= least else NEVER)
    return found if found != NEVER else np.int32(begin)


@njit(**LOOSE)
def _span(low, high, first, last, keys):
    """The columns that some of the rows `first:last` see, as their bounds."""
    left, right = keys, 0
    for i in range(first, last):
        if low[i] < high[i]:
            left, right = min(left, low[i]), max(right, high[i])
    return left, right


@njit(**LOOSE)
def _lower(sums, out, halvings):
    """The sums of a row, relative to a largest score that lies so many halvings of a weight higher."""
    factor = 2.0**-halvings
    sums[ENTROPY] = (sums[ENTROPY] + halvings * sums[MASS]) * factor
    for s in range(1, SUMS):
        sums[s] *= factor
    for x in range(len(out)):
        out[x] *= factor


@njit(**LOOSE)
def _add_columns(e, at, step, c0, c1, c2, c3, begin, end, column):
    """Add the weights of four rows, each times its factor, to the sums of their columns."""
    second, third, fourth = at + step, at + step + step, at + step + step + step
    for j in range(begin, end):
        column[j] += c0 * e[at + j] + c1 * e[second + j] + c2 * e[third + j] + c3 * e[fourth + j]


@functools.cache
def walk_of(asked: Asked) -> Callable[..., None]:
    """The compiled walk over some rows of the maps of one batch row that finds what is asked for.

    It is called with
    - q [head, query, d]; keys in panels of `WIDE`, flat [kv head, panel, d, key], and values in panels of as many
      features, flat [kv head, panel, key, feature]; how many keys there are and how many heads share them;
    - the log-sum-exp of the rows [head, query] if it is known, +inf where a row has no weights, else of no rows; where
      it is not known, the logits of learned sinks [head, query], of no rows without them;
    - whether a query is real [query]; the columns that rows see [query] as `low` and `high`; the first and the last
      row; the column of row 0's own position; the scale; the window of `windowed_distance`;
    - arrays to write to: those of `ROW`, the columns of the largest weights, and [head, key] to add the column sums to,
      each of no rows where it is not wanted; z [head, query, feature], of no features where it is not wanted, and the
      log-sum-exp, which is written where it was not known.
    """
    entropy, distance, distance_squared, windowed_distance, received = asked

    @njit(**LOOSE)
    def swept(e, at, begin, end, most, unit, own, window, numbers):
        """One row of a strip: scores become weights relative to `most`; gives their sums, in the order of `sums`."""
        mass = spread = far = squared = windowed = ZERO
        for j in range(begin, end):
            weight, y = weighed(e[at + j], most, unit)
            e[at + j] = weight
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
        return spread, far, squared, windowed, mass

    @njit(WALK, **LOOSE)
    def walk(
        q, keys, values, length, group, given, sinks, real, low, high, first_row, last_row, shift, scale, window,
        found, argmax, total, z, lse,
    ):  # fmt: skip
        # an index with a sign is looked at in every turn of a loop, as it may count from the end
        u = np.uint64
        d, width = q.shape[2], z.shape[2]
        panels, strips = (width + WIDE - 1) // WIDE, (length + STRIP - 1) // STRIP
        step, unit = strips * STRIP + APART, np.float32(scale / LN2)
        of_keys, of_values = (length + WIDE - 1) // WIDE * d * WIDE, panels * length * WIDE
        e, near = np.zeros(PIECE * step, np.float32), np.zeros(PIECE * d, np.float32)
        part, numbers = np.empty(ROWS * WIDE, np.float32), np.arange(STRIP).astype(np.float32)
        # for each row: the largest score up to each strip and so far, the strip where it is, sums and output
        tops, most = np.empty((strips, PIECE), np.float32), np.empty(PIECE, np.float32)
        place, sums = np.empty(PIECE, np.int64), np.empty((PIECE, SUMS))
        out = np.empty((PIECE, panels * WIDE))
        shares, factors = np.empty(PIECE), np.empty(PIECE, np.float32)
        for h in range(q.shape[0]):
            key_at, value_at = h // group * of_keys, h // group * of_values
            for top in range(first_row, last_row, PIECE):
                bottom = min(top + PIECE, last_row)
                for i in range(PIECE):
                    for f in range(d):
                        near[i * d + f] = q[h, top + i, f] if top + i < bottom else ZERO
                sums[:], out[:], most[:], shares[:] = 0.0, 0.0, -np.inf, 0.0
                left, right = _span(low, high, top, bottom, length)
                left = left // STRIP * STRIP
                for strip in range(left, right, STRIP):
                    for some in range(top, bottom, ROWS):
                        last, s = min(some + ROWS, bottom), strip // STRIP
                        begin, end = _span(low, high, some, last, length)
                        begin, end = max(begin - strip, 0), min(end - strip, STRIP)
                        for n in range(some - top, last - top):
                            tops[s, n] = -np.inf
                        if begin >= end:
                            continue
                        outer, stop = begin // WIDE * WIDE, (end + WIDE - 1) // WIDE * WIDE
                        here = (some - top) * step + strip
                        for p in range(outer, stop, WIDE):
                            products(
                                near, u((some - top) * d), u(d), keys, u(key_at + (strip + p) * d), u(d),
                                e, u(here + p), u(step),
                            )  # fmt: skip
                        for i in range(some, last):
                            n, at = i - top, (i - top) * step + strip
                            mine, till = max(low[i] - strip, 0), min(high[i] - strip, STRIP)
                            if mine < till and not (given.size and given[h, i] == np.inf):
                                high_score = largest(e, u(at + mine), u(at + till))
                                if high_score > most[n]:
                                    if sums[n, MASS] > 0:
                                        halvings = np.float64(high_score) - np.float64(most[n])
                                        _lower(sums[n], out[n], halvings * unit)
                                    most[n], place[n] = high_score, strip
                                tops[s, n] = most[n]
                                more = swept(
                                    e, u(at), u(mine), u(till), most[n], unit, np.float32(i + shift - strip),
                                    window, numbers,
                                )  # fmt: skip
                                for x in range(SUMS):
                                    sums[n, x] += more[x]
                            else:
                                mine = till = outer
                            # a loop each: a slice is made in more time than these few take
                            for j in range(u(at + outer), u(at + mine)):
                                e[j] = ZERO
                            for j in range(u(at + till), u(at + stop)):
                                e[j] = ZERO
                        for p in range(panels):
                            products(
                                e, u(here + begin), u(step),
                                values, u(value_at + (p * length + strip + begin) * WIDE), u(end - begin),
                                part, u(0), u(WIDE),
                            )  # fmt: skip
                            for n in range(last - some):
                                for x in range(WIDE):
                                    out[some - top + n, p * WIDE + x] += part[n * WIDE + x]
                for i in range(top, bottom):
                    n, mass = i - top, sums[i - top, MASS]
                    if not mass > 0:
                        continue
                    share, peak = 1 / mass, np.float64(most[n]) * scale
                    if given.size:
                        # no weight exceeds 1: at scores of 1e4 the rounding of another kernel's lse would say otherwise
                        share = min(share, np.exp(peak - given[h, i]))
                    else:
                        whole = peak + np.log(mass)
                        if sinks.size:
                            sink = np.float64(sinks[h, i])
                            whole = max(whole, sink) + np.log1p(np.exp(-abs(whole - sink)))
                            share = np.exp(peak - whole)
                        lse[h, i] = whole
                    for x in range(width):
                        z[h, i, x] = out[n, x] * share
                    shares[n] = share if real[i] else 0.0
                    if found[ENTROPY].size and share > 0:
                        found[ENTROPY][h, i] = share * (sums[n, ENTROPY] * LN2 - np.log(share) * mass)
                    for x in range(FAR, SUMS):
                        if found[x].size:
                            found[x][h, i] = sums[n, x] * share
                    if found[MAX].size:
                        found[MAX][h, i] = share
                    for x in range(SELF, FIRST + 1):
                        column = low[i] if x == FIRST else i + shift - (x - SELF)
                        if found[x].size and low[i] <= column < high[i]:
                            above = np.float64(most[n]) - np.float64(tops[column // STRIP, n])
                            found[x][h, i] = e[n * step + column] * share * 2.0 ** (-above * unit)
                    if argmax.size:
                        mine, till = max(low[i] - place[n], 0), min(high[i] - place[n], STRIP)
                        at = n * step + place[n]
                        argmax[h, i] = place[n] + _first_at_least(e, u(at), u(mine), u(till), C0)
                if received:
                    for strip in range(left, right, STRIP):
                        factors[:] = ZERO
                        for n in range(bottom - top):
                            above = np.float64(most[n]) - np.float64(tops[strip // STRIP, n])
                            if shares[n] > 0 and above < np.inf:
                                factors[n] = shares[n] * 2.0 ** (-above * unit)
                        for some in range(top, bottom, ROWS):
                            begin, end = _span(low, high, some, min(some + ROWS, bottom), length)
                            begin, end = max(begin - strip, 0), min(end - strip, STRIP)
                            for n in range(some - top, some - top + ROWS, FOUR):
                                if begin < end:
                                    _add_columns(
                                        e, u(n * step + strip), u(step), factors[n], factors[n + 1],
                                        factors[n + 2], factors[n + 3], u(begin), u(end), total[h, strip:],
                                    )  # fmt: skip

    return walk
