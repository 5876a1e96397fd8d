"""K2, the key-major pass: `P^T @ Y` and the column sums of a block of keys in one walk over the queries that see them.

Weights come from the saved log-sum-exp, so a tile needs one product and one exponential per pair. Each program owns its
keys: no atomics, and the same bits in every run. A range of queries or a band of later queries narrows the walk; what
narrows the walk does not change the weights. Weight edits enter as in K1, as a factor per row and class of keys.
"""

import triton
import triton.language as tl

from headwater.kernels.backends.triton.shared import HIDDEN, LOG2_E, base2, edited, fetch, hide, product

# lengths and offsets vary from call to call: no compilation for each
_VARYING = ["queries", "keys", "from_row", "to_row", "shift", "left", "right", "scale", "cap"]


@triton.jit(do_not_specialize=_VARYING)
def columns(
    Q, K, Y, OUT, RECEIVED, LSE,
    BIAS, TAU, SLOPES, KEY_FLAGS, QUERY_FLAGS, HEAD_FLAGS, FACTOR, KEPT,
    q_batch, q_head, q_row, k_batch, k_head, k_row, y_batch, y_head, y_row,
    bias_batch, bias_head, bias_row, bias_column, key_flags_batch, query_flags_batch,
    tau_batch, head_flags_batch, heads, group, queries, keys, from_row, to_row, shift, left, right, scale, cap,
    D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    SUMS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr, BLOCKED: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, KEYED: tl.constexpr, SLOPED: tl.constexpr,
    TEMPERED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one head, collecting from the rows `from_row:to_row` that see them.

    LSE is 1e30 on rows without weights. KEYED: the bias is the same for all queries. VALUES: "none", or the mode of
    `product` for Y, float32 [.., query, C].
    """
    blocks = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    pair = program // blocks
    # the first keys first: under a causal mask most queries see them
    column0 = program % blocks * BLOCK_N
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)

    column = column0 + tl.arange(0, BLOCK_N)
    feature, value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    line = tl.arange(0, BLOCK_M)
    on_columns = column < keys
    EVEN_D: tl.constexpr = D == BLOCK_D

    k_at = K + batch * k_batch + (head // group) * k_head
    k_at += column.to(tl.int64)[:, None] * k_row + feature[None, :]
    k = fetch(k_at, column[:, None], keys, feature[None, :], D, True, EVEN_D, UPCAST)
    outer = LOG2_E * 1.0
    if TEMPERED:
        outer = outer * tl.load(TAU + batch * tau_batch + head)
    inner = scale * 1.0
    if not (CAPPED or BIASED or SLOPED):
        inner = scale * outer
    slope = 0.0
    if SLOPED:
        slope = tl.load(SLOPES + head)
    key_flags = 0
    if PADDED or BLOCKED or CLASSES > 1:
        key_flags = tl.load(KEY_FLAGS + batch * key_flags_batch + column, mask=on_columns, other=1)[:, None]
    head_flags = 0
    if BLOCKED:
        head_flags = tl.load(HEAD_FLAGS + batch * head_flags_batch + head)
    # Kept for the whole walk: k [N, D], received [N] = sum_i p_ij and out [N, C] = sum_i p_ij y_i. No other program has
    # these keys, so the sums need no atomics. The weights are final, p = 2^(s - lse): nothing has to be rescaled.
    received = tl.zeros([BLOCK_N], tl.float32)
    out = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)

    # rows [low, high) hold all that see these keys; inside [clear, rim) no test is needed
    low, high = from_row * 1, to_row * 1
    clear, rim = from_row * 1, to_row * 1
    if RIGHT:
        low = tl.maximum(low, column0 - shift - right)
        clear = tl.maximum(clear, column0 + BLOCK_N - 1 - shift - right)
    if LEFT:
        high = tl.minimum(high, column0 + BLOCK_N - shift + left)
        rim = tl.minimum(rim, column0 - shift + left + 1)
    low = low // BLOCK_M * BLOCK_M
    clear = tl.cdiv(clear, BLOCK_M) * BLOCK_M
    rim = tl.maximum(rim, 0) // BLOCK_M * BLOCK_M
    first_row = pair.to(tl.int64) * queries

    # as in K1: phase 0 is [low, clear), 1 the inner rows, 2 [rim, high); tiles are [key, query], transposed to K1's
    for phase in tl.static_range(3):
        begin, end = clear, rim
        if phase == 0:
            begin, end = low, tl.minimum(clear, high)
        if phase == 2:
            begin, end = tl.maximum(clear, rim), high
        offset = tl.cast(begin, tl.int64)
        q_at = Q + batch * q_batch + head * q_head + (offset + line)[:, None] * q_row + feature[None, :]
        y_at = Y
        if VALUES != "none":
            y_at = Y + batch * y_batch + head * y_head + (offset + line)[:, None] * y_row + value[None, :]
        bias_at = BIAS
        if BIASED:
            bias_at = BIAS + batch * bias_batch + head * bias_head
            if KEYED:
                bias_at += column.to(tl.int64) * bias_column
            else:
                bias_at += (offset + line)[None, :] * bias_row + column.to(tl.int64)[:, None] * bias_column
        for start in range(begin, end, BLOCK_M):
            row = start + line
            here = (row >= from_row) & (row < to_row)
            q = fetch(q_at, row[:, None], queries, feature[None, :], D, phase != 1, EVEN_D, UPCAST)
            if phase == 1:
                lse = tl.load(LSE + first_row + row) * LOG2_E
            else:
                lse = tl.load(LSE + first_row + row, mask=here, other=-HIDDEN) * LOG2_E
            score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            bias = 0.0
            if BIASED and KEYED:
                bias = tl.load(bias_at, mask=on_columns, other=0.0).to(tl.float32)[:, None]
            if BIASED and not KEYED:
                seen = on_columns[:, None] & here[None, :]
                bias = tl.load(bias_at, mask=seen, other=0.0).to(tl.float32)
            if SLOPED:
                bias -= slope * tl.abs(row[None, :] + shift - column[:, None]).to(tl.float32)
            row_flags = 0
            if BLOCKED:
                row_flags = tl.load(QUERY_FLAGS + batch * query_flags_batch + row, mask=here, other=0)
                row_flags = (row_flags & head_flags)[None, :]
            score = base2(score, bias, inner, cap, outer, CAPPED, BIASED or SLOPED)
            score = hide(
                score, row[None, :], column[:, None], keys, shift, left, right, key_flags, row_flags,
                phase != 1, LEFT, RIGHT, PADDED, BLOCKED,
            )  # fmt: skip
            # no weight exceeds 1, whatever the rounding of scores says; lse is 1e30 on rows without weights: p = 0
            p = tl.exp2(tl.minimum(score - lse[None, :], 0.0))
            if CLASSES > 0:
                kept = tl.load(KEPT + first_row + row, mask=here, other=0.0)
                p = edited(
                    p, row[None, :], column[:, None], shift, (key_flags >> 16) & 15, FACTOR, queries,
                    (first_row * CLASSES + row)[None, :], here[None, :], kept[None, :], CLASSES,
                )  # fmt: skip
            if SUMS:
                received += tl.sum(p, 1)
            if VALUES != "none":
                y = fetch(y_at, row[:, None], queries, value[None, :], C, True, C == BLOCK_C, False)
                out = product(p, y.to(tl.float32), out, VALUES)
                y_at += BLOCK_M * y_row
            q_at += BLOCK_M * q_row
            if BIASED and not KEYED:
                bias_at += BLOCK_M * bias_row

    out_at = pair.to(tl.int64) * keys + column
    if SUMS:
        tl.store(RECEIVED + out_at, received, mask=on_columns)
    if VALUES != "none":
        out_mask = on_columns[:, None] & (value < C)[None, :]
        tl.store(OUT + out_at[:, None] * C + value[None, :], out, mask=out_mask)
