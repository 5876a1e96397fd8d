"""What the two Triton kernels share: loads, the score of a pair in base 2, who sees whom, and products of weights.

The formulas are those of `rule.py`. Scores carry log2(e), as GPUs have an instruction for 2^x and none for e^x:
exp(s) = 2^(s * log2(e)), and the factor joins the scale, which is multiplied in anyway. A hidden pair gets a finite
score of -1e30, which keeps `weight * score` free of NaN. A bias below that counts as hidden.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1.0e30)
# a row whose largest score is below sees no key
NOTHING_SEEN = tl.constexpr(-1.0e29)


@triton.jit
def fetch(
    at, position, length, feature, width, CHECK: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr
):
    """A tile; CHECK the positions against `length`, and unless EVEN the features against `width`, with zeros beyond.

    The interpreter multiplies the bit patterns of bfloat16, hence UPCAST there.
    """
    if CHECK:
        inside = position < length
        tile = tl.load(at, mask=inside if EVEN else inside & (feature < width), other=0.0)
    else:
        tile = tl.load(at) if EVEN else tl.load(at, mask=feature < width, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def base2(raw, bias, inner, cap, outer, CAPPED: tl.constexpr, BIASED: tl.constexpr):
    """From `q·k` to the score times log2(e): `inner` comes before cap and bias, `outer` after them."""
    score = raw * inner
    if CAPPED:
        # tanh from exp2, as the language has none; beyond 2^120 it has long been 1
        score = cap * (1.0 - 2.0 / (1.0 + tl.exp2(tl.minimum(score * (2.0 * LOG2_E / cap), 120.0))))
    if BIASED:
        score = score + bias
    if CAPPED or BIASED:
        score = tl.maximum(score * outer, HIDDEN)
    return score


@triton.jit
def hide(
    score, row, column, keys, shift, left, right, key_flags, row_flags,
    RIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr, BLOCKED: tl.constexpr,
):  # fmt: skip
    """The score where the query sees the key, HIDDEN elsewhere. All arguments broadcast, in either orientation.

    Bit 0 of `key_flags` marks padding; bits 1 to 15 are blocks, each active where `row_flags` holds the same bit.
    """
    if RIM:
        seen = (column < keys) & (column >= 0)
        if RIGHT:
            seen = seen & (column - row <= shift + right)
        if LEFT:
            seen = seen & (row - column <= left - shift)
        score = tl.where(seen, score, HIDDEN)
    if PADDED:
        score = tl.where((key_flags & 1) == 0, score, HIDDEN)
    if BLOCKED:
        score = tl.where((key_flags & row_flags & 0xFFFE) == 0, score, HIDDEN)
    return score


@triton.jit
def edited(weight, row, column, shift, key_class, FACTOR, plane, at, on_rows, kept, CLASSES: tl.constexpr):
    """Weights after the weight edits: times the row's factor for the key's class, plus `kept` on the own position.

    FACTOR is [class, row] at stride `plane`; `at`, `on_rows` are offsets and mask of the rows, in the orientation of
    `weight`, and so are `row`, `column`, `key_class` and `kept`.
    """
    # a table of CLASSES entries per row, read by selection: registers can not be indexed
    factor = tl.load(FACTOR + at, mask=on_rows, other=1.0)
    factor = tl.where(key_class == 0, factor, 0.0)
    for c in tl.static_range(1, CLASSES):
        other = tl.load(FACTOR + at + c * plane, mask=on_rows, other=1.0)
        factor = tl.where(key_class == c, other, factor)
    return weight * factor + tl.where(column == row + shift, kept, 0.0)


@triton.jit
def product(a, b, accumulator, MODE: tl.constexpr):
    """`accumulator + a @ b` for float32 operands.

    MODE "split" takes three bfloat16 products of high and low parts (relative error 2^-16), so that a product with
    few columns stays on the tensor cores; any other MODE is the `input_precision` of one product.
    """
    if MODE == "split":
        # a b = (a_high + a_low)(b_high + b_low), without the last of four products, which is below 2^-16
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        accumulator = tl.dot(a_high, b_high, accumulator)
        accumulator = tl.dot(a_low, b_high, accumulator)
        accumulator = tl.dot(a_high, b_low, accumulator)
    else:
        accumulator = tl.dot(a, b, accumulator, input_precision=MODE)
    return accumulator
