"""The arithmetic of the compiled loops: the exponential of a whole vector, and products of small tiles of matrices.

`products` is written in vectors, as the compiler keeps no tile of sums in registers by itself. With 512 bits it has 8
rows × 32 columns in hand, otherwise 4 × 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import __version__, config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and without a compiler these loops take hours")

COMPILER = f"numba {__version__}"


def _has_512_bits() -> bool:
    told = config.CPU_FEATURES
    return "+avx512f" in told if told is not None else bool(binding.get_host_cpu_features().get("avx512f"))


LANES, ROWS = (16, 8) if _has_512_bits() else (8, 4)
WIDE = 2 * LANES  # columns of a tile of sums
# sums may be taken in another order and products joined to them, so that they fill vectors; NaN stays NaN
LOOSE = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True, "error_model": "numpy"}


def _exponential() -> list[np.float32]:
    """Coefficients of 2^r on -1/2 to 1/2, by Chebyshev interpolation; its relative error is 4e-9."""
    by_chebyshev = np.polynomial.chebyshev.chebinterpolate(lambda x: 2.0 ** (x / 2), 6)
    powers = np.polynomial.chebyshev.cheb2poly(by_chebyshev)
    return [np.float32(c) for c in powers * 2.0 ** np.arange(7)]


C0, C1, C2, C3, C4, C5, C6 = _exponential()
ZERO, HALF = np.float32(0), np.float32(0.5)
LAST = np.float32(126)  # halvings after which a weight is 0: smaller ones are no normal float32
MOST = np.float32(127).view(np.int32)
SIGN, POSITIVE = np.int32(31), np.int32(2**31 - 1)
LOWEST = np.float32(-np.inf).view(np.int32) ^ POSITIVE
NONE, EXPONENT = np.int32(0), np.int32(23)


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
def weighed(score, most, unit):
    """2^-y and y, which is (most - score) * unit and 0 at least, a NaN counting as the largest.

    The exponent is set by hand and a polynomial gives the rest. Bits of float32 numbers that are not negative are in
    the order of the numbers.
    """
    bits = min(max(_bits((most - score) * unit), NONE), MOST)
    y = _of_bits(bits)
    whole = np.int32(y + HALF)
    r = np.float32(whole) - y
    part = C0 + r * (C1 + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))))
    weight = _of_bits(np.int32(_bits(part) - np.int32(whole << EXPONENT)))
    return (weight if y < LAST else ZERO), y


@njit(**LOOSE)
def _in_order(bits):
    """Bits of float32 numbers as whole numbers of the same order, and back."""
    return np.int32(bits ^ ((bits >> SIGN) & POSITIVE))


@njit(**LOOSE)
def largest(e, begin, end):
    """The largest of some numbers, by whole numbers: the largest of float32 is found one by one, not in vectors."""
    most = LOWEST
    for j in range(begin, end):
        most = max(most, _in_order(_bits(e[j])))
    return _of_bits(_in_order(most))


@intrinsic
def products(
    context: Any, a: Any, a_at: Any, a_step: Any, b: Any, b_at: Any, count: Any, c: Any, c_at: Any, c_step: Any
) -> Any:  # fmt: skip
    """c[r, x] = sum over n < count of a[r, n] * b[n, x], for `ROWS` rows r and `WIDE` columns x.

    All are parts of flat float32 arrays from `a_at`, `b_at`, `c_at` on. Rows of a and c are `a_step` and `c_step`
    apart, those of b lie side by side. Each sum is taken in the order of n.
    """
    place = types.uint64
    signature = types.void(a, place, place, b, place, place, c, place, place)

    def code(context, builder, signature, given):  # type: ignore[no-untyped-def]
        a, b, c = (context.make_array(signature.args[n])(context, builder, given[n]).data for n in (0, 3, 6))
        _, a_at, a_step, _, b_at, count, _, c_at, c_step = given
        vector, number = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        every = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        halves = [ir.Constant(number, n) for n in range(0, WIDE, LANES)]

        def row(base: Any, at: Any, step: Any, n: int) -> Any:
            return builder.gep(base, [builder.add(at, builder.mul(step, ir.Constant(number, n)))])

        def vectors(base: Any) -> list[Any]:
            return [builder.bitcast(builder.gep(base, [n]), vector.as_pointer()) for n in halves]

        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in halves] for _ in range(ROWS)]
        rows = [row(a, a_at, a_step, n) for n in range(ROWS)]
        with cgutils.for_range(builder, count) as loop:
            beside = builder.gep(b, [builder.add(b_at, builder.mul(loop.index, ir.Constant(number, WIDE)))])
            columns = [builder.load(at, align=4) for at in vectors(beside)]
            for n in range(ROWS):
                one = builder.load(builder.gep(rows[n], [loop.index]), align=4)
                one = builder.shuffle_vector(builder.insert_element(nothing, one, first), nothing, every)
                for total, column in zip(sums[n], columns, strict=True):
                    more = builder.fmul(one, column, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), more, flags=("contract",)), total)
        for n in range(ROWS):
            for total, at in zip(sums[n], vectors(row(c, c_at, c_step, n)), strict=True):
                builder.store(builder.load(total), at, align=4)
        return context.get_dummy_value()

    return signature, code
