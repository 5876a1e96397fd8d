"""K1, the query-major pass: output, log-sum-exp and every row statistic of some queries in one walk over their keys.

Two modes. From scratch, the softmax is online and the statistics are running sums rescaled with it, as in
FlashAttention (Dao et al. 2022): the entropy state `sum p (s - highest)` needs one multiply-add per element, and
learned sinks are merged at the end. With REPLAY the saved log-sum-exp is given, weights come out final, and edited
weights are measured (a factor per row and class of keys, and mass kept on the own position). Weights on the own,
previous and first key are read off after the walk, so they cost nothing in the loop. Costs: docs/kernels.md.
"""

import triton
import triton.language as tl

from headwater.kernels.backends.triton.shared import (
    HIDDEN,
    LN_2,
    LOG2_E,
    NOTHING_SEEN,
    base2,
    edited,
    fetch,
    hide,
    product,
)

# lengths and offsets vary from call to call: no compilation for each
_VARYING = ["queries", "keys", "shift", "left", "right", "plane", "scale", "cap", "window", "skipped"]


@triton.jit(do_not_specialize=_VARYING)
def rows(
    Q, K, V, Z, LSE, FOUND, ARGMAX, MASS,
    BIAS, SINKS, TAU, SLOPES, KEY_FLAGS, QUERY_FLAGS, HEAD_FLAGS, KEY_GROUPS, FIRST, FACTOR, KEPT,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_row, bias_column, key_flags_batch, query_flags_batch, groups_batch, first_batch,
    tau_batch, head_flags_batch, heads, group, v_group, queries, keys, shift, left, right, scale, cap, plane, window,
    skipped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REPLAY: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr, UPCAST: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr, BLOCKED: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, KEYED: tl.constexpr, SLOPED: tl.constexpr, SUNK: tl.constexpr,
    TEMPERED: tl.constexpr, FOLDED: tl.constexpr, BEHIND: tl.constexpr, CLASSES: tl.constexpr,
    ENTROPY: tl.constexpr, TOP: tl.constexpr, PLACE: tl.constexpr, DISTANCE: tl.constexpr, TOTAL: tl.constexpr,
    SQUARED: tl.constexpr, CLIPPED: tl.constexpr,
    OWN: tl.constexpr, BEFORE: tl.constexpr, EARLIEST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head.

    FOUND [statistic, batch, head, query] has a plane of `plane` numbers per statistic; ENTROPY, TOP, DISTANCE, SQUARED,
    CLIPPED, TOTAL, OWN, BEFORE, EARLIEST are the plane of each, or -1 where it is not wanted; CLIPPED sums distances
    up to `window`, a float. KEYED: the bias is the same for all queries. BEHIND: no key ahead is seen. VALUES: "none",
    "own" (weights rounded to the values' type), or the mode of `product` for float32 values. MIXED is that mode for
    masses. Columns before `skipped` are left out of the walk.
    """
    # blocks of the last queries first: under a causal mask they are the longest
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    pair = program // blocks
    row0 = (blocks - 1 - program % blocks) * BLOCK_M
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    kv_head = head // group

    row = row0 + tl.arange(0, BLOCK_M)
    feature, value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    line = tl.arange(0, BLOCK_N)
    step = line.to(tl.float32)
    on_rows = row < queries
    out_at = pair.to(tl.int64) * queries + row
    plane = tl.cast(plane, tl.int64)
    EVEN_D: tl.constexpr = D == BLOCK_D
    EVEN_V: tl.constexpr = DV == BLOCK_V

    q_at = Q + batch * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_row + feature[None, :]
    q = fetch(q_at, row[:, None], queries, feature[None, :], D, True, EVEN_D, UPCAST)
    k_base = K + batch * k_batch + kv_head * k_head
    outer = LOG2_E * 1.0
    if TEMPERED:
        outer = outer * tl.load(TAU + batch * tau_batch + head)
    inner = scale * 1.0
    if not (CAPPED or BIASED or SLOPED):
        inner = scale * outer
    slope = 0.0
    if SLOPED:
        slope = tl.load(SLOPES + head)
    row_flags = 0
    if BLOCKED:
        row_flags = tl.load(QUERY_FLAGS + batch * query_flags_batch + row, mask=on_rows, other=0)
        row_flags = (row_flags & tl.load(HEAD_FLAGS + batch * head_flags_batch + head))[:, None]

    # FOLDED: nothing but a positive scale lies between q·k and the score in base 2, so scores and maxima stay raw and
    # the scale is multiplied in where the exponential is taken: 2^(unit * s - unit * highest), one multiply-add.
    unit = inner if FOLDED else 1.0
    # What the walk carries, all in registers. m is `highest`, and p_ij = 2^(s_ij - m_i) until the end of the walk:
    #   total [M] = sum p      spread [M] = sum p (s - m)      far, farther, clipped [M] = sum p times a distance
    #   mass [M, 16] = sum p of each group of keys             z [M, V] = sum p v
    highest = tl.full([BLOCK_M], 0.0 if REPLAY else NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    spread = tl.zeros([BLOCK_M], tl.float32)
    far = tl.zeros([BLOCK_M], tl.float32)
    farther = tl.zeros([BLOCK_M], tl.float32)
    clipped = tl.zeros([BLOCK_M], tl.float32)
    best = tl.zeros([BLOCK_M], tl.int32)
    mass = tl.zeros([BLOCK_M, 16], tl.float32)
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    lse = highest
    kept = highest
    if REPLAY:
        lse = tl.load(LSE + out_at, mask=on_rows, other=-HIDDEN) * LOG2_E
    if CLASSES > 0:
        kept = tl.load(KEPT + out_at, mask=on_rows, other=0.0)
    factor_at = pair.to(tl.int64) * CLASSES * queries + row

    # columns [low, high) hold all that the band lets these rows see; inside [clear, rim) no test is needed
    low, high = skipped * 1, keys
    clear, rim = low, keys
    if LEFT:
        low += tl.maximum(row0 + shift - left - skipped, 0) // BLOCK_N * BLOCK_N
        clear += tl.cdiv(tl.maximum(row0 + BLOCK_M - 1 + shift - left - skipped, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        high = tl.minimum(tl.maximum(row0 + BLOCK_M + shift + right, 0), keys)
        rim = tl.minimum(tl.maximum(row0 + shift + right + 1, 0), keys)
    rim = skipped + tl.maximum(rim - skipped, 0) // BLOCK_N * BLOCK_N

    # Phase 0 walks over [low, clear), 1 over [clear, rim), 2 over [rim, high): only the rims, 0 and 2, test the mask.
    for phase in tl.static_range(3):
        if phase > 0 or LEFT:
            begin, end = clear, rim
            if phase == 0:
                begin, end = low, tl.minimum(clear, high)
            if phase == 2:
                begin, end = tl.maximum(clear, rim), high
            offset = tl.cast(begin, tl.int64)
            k_at = k_base + (offset + line)[:, None] * k_row + feature[None, :]
            v_at = V
            if VALUES != "none":
                v_at = V + batch * v_batch + (head // v_group) * v_head
                v_at += (offset + line)[:, None] * v_row + value[None, :]
            bias_at = BIAS
            if BIASED:
                bias_at = BIAS + batch * bias_batch + head * bias_head
                if KEYED:
                    bias_at += (offset + line) * bias_column
                else:
                    bias_at += row.to(tl.int64)[:, None] * bias_row + (offset + line)[None, :] * bias_column
            for start in range(begin, end, BLOCK_N):
                column = start + line
                here = column < keys
                k = fetch(k_at, column[:, None], keys, feature[None, :], D, phase != 1, EVEN_D, UPCAST)
                score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                bias = 0.0
                if BIASED and KEYED:
                    bias = tl.load(bias_at, mask=here, other=0.0).to(tl.float32)[None, :]
                if BIASED and not KEYED:
                    bias = tl.load(bias_at, mask=on_rows[:, None] & here[None, :], other=0.0).to(tl.float32)
                if SLOPED:
                    bias -= slope * tl.abs(row[:, None] + shift - column[None, :]).to(tl.float32)
                key_flags = 0
                if PADDED or BLOCKED or CLASSES > 1:
                    key_flags = tl.load(KEY_FLAGS + batch * key_flags_batch + column, mask=here, other=1)
                    key_flags = key_flags[None, :]
                if not FOLDED:
                    score = base2(score, bias, inner, cap, outer, CAPPED, BIASED or SLOPED)
                score = hide(
                    score, row[:, None], column[None, :], keys, shift, left, right, key_flags, row_flags,
                    phase != 1, LEFT, RIGHT, PADDED, BLOCKED,
                )  # fmt: skip

                if REPLAY:
                    # no weight exceeds 1, whatever the rounding of scores says
                    score = tl.minimum(score - lse[:, None], 0.0)
                    p = tl.exp2(score)
                    if CLASSES > 0:
                        p = edited(
                            p, row[:, None], column[None, :], shift, (key_flags >> 16) & 15, FACTOR, queries,
                            factor_at[:, None], on_rows[:, None], kept[:, None], CLASSES,
                        )  # fmt: skip
                        if ENTROPY >= 0:
                            score = tl.log2(tl.maximum(p, 1e-37))
                    compared = p
                    shrink = 1.0
                else:
                    compared = score
                if not REPLAY or TOP >= 0 or PLACE:
                    if PLACE:
                        # of two neighbours, which one thread has, the larger: half as many indices to carry
                        pairs = tl.max(tl.reshape(compared, [BLOCK_M, BLOCK_N // 2, 2]), 2)
                        peak, where = tl.max(
                            pairs, 1, return_indices=True, return_indices_tie_break_left=True
                        )
                        best = tl.where(peak > highest, start + 2 * where, best)
                    else:
                        peak = tl.max(compared, 1)
                    new_highest = tl.maximum(highest, peak)
                    # Online softmax: once the maximum is m' instead of m, all that was summed shrinks by 2^(m - m').
                    # sum p (s - m') = 2^(m - m') (sum p (s - m) + (m - m') sum p), hence the line for `spread`.
                    if not REPLAY:
                        score = score * unit - (new_highest * unit)[:, None]
                        p = tl.exp2(score)
                        sunk = (highest - new_highest) * unit
                        shrink = tl.exp2(sunk)
                        if ENTROPY >= 0:
                            spread = shrink * (spread + sunk * total)
                    highest = new_highest
                here_total = tl.sum(p, 1)
                total = total * shrink + here_total
                if ENTROPY >= 0:
                    spread += tl.sum(p * score, 1)
                if DISTANCE >= 0 or SQUARED >= 0 or CLIPPED >= 0:
                    ahead = (row + shift - start).to(tl.float32)
                    apart = ahead[:, None] - step[None, :]
                    if not BEHIND:
                        apart = tl.abs(apart)
                    if DISTANCE >= 0 and BEHIND:
                        # what is seen lies behind, so distances are differences: one multiply-add per weight
                        far = far * shrink + (ahead * here_total - tl.sum(p * step[None, :], 1))
                    if DISTANCE >= 0 and not BEHIND:
                        far = far * shrink + tl.sum(p * apart, 1)
                    if SQUARED >= 0:
                        farther = farther * shrink + tl.sum(p * apart * apart, 1)
                    if CLIPPED >= 0:
                        clipped = clipped * shrink + tl.sum(p * tl.minimum(apart, window), 1)
                if GROUPS > 0:
                    bits = tl.load(KEY_GROUPS + batch * groups_batch + column, mask=here, other=0)
                    inside = ((bits[:, None] >> tl.arange(0, 16)[None, :]) & 1).to(tl.float32)
                    if not REPLAY:
                        mass = mass * shrink[:, None]
                    mass = product(p, inside, mass, MIXED)
                if VALUES != "none":
                    v = fetch(v_at, column[:, None], keys, value[None, :], DV, phase != 1, EVEN_V, UPCAST)
                    if not REPLAY:
                        z = z * shrink[:, None]
                    if VALUES == "own":
                        z = tl.dot(p.to(v.dtype), v, z, input_precision=PRECISION)
                    else:
                        z = product(p, v.to(tl.float32), z, VALUES)
                    v_at += BLOCK_N * v_row
                k_at += BLOCK_N * k_row
                if BIASED:
                    bias_at += BLOCK_N * bias_column

    if REPLAY:
        share = 1.0
        top = highest
        entropy = -LN_2 * spread
        nothing = row < 0
    else:
        nothing = highest <= NOTHING_SEEN
        highest = highest * unit
        # lse = m + log2(total), in base 2; a learned sink joins the denominator only here, so that it is never the
        # maximum. `share` = 2^(m - lse) turns all sums over p into sums over weights. With w = share * p and s - m for
        # the scores, entropy = lse * sum w - sum w s = share * ((lse - m) * total - spread), times ln 2 for nats.
        lse = highest + tl.log2(tl.where(nothing, 1.0, total))
        if SUNK:
            sink = tl.load(SINKS + head) * LOG2_E
            larger = tl.maximum(lse, sink)
            lse = larger + tl.log2(tl.exp2(lse - larger) + tl.exp2(sink - larger))
            share = tl.exp2(highest - lse)
        else:
            share = 1.0 / tl.where(nothing, 1.0, total)
        share = tl.where(nothing, 0.0, share)
        top = share
        entropy = LN_2 * share * ((lse - highest) * total - spread)
        lse = tl.where(nothing, HIDDEN, lse)
        tl.store(LSE + out_at, tl.where(nothing, float("-inf"), lse * LN_2), mask=on_rows)

    if VALUES != "none":
        if not REPLAY:
            z = tl.where(nothing[:, None], 0.0, z * share[:, None])
        z_at = Z + out_at[:, None] * DV + value[None, :]
        z_mask = on_rows[:, None] if EVEN_V else on_rows[:, None] & (value < DV)[None, :]
        tl.store(z_at, z.to(Z.dtype.element_ty), mask=z_mask)
    if ENTROPY >= 0:
        # rounding may leave -0 on a one-hot row
        tl.store(FOUND + ENTROPY * plane + out_at, tl.maximum(entropy, 0.0), mask=on_rows)
    if TOP >= 0:
        tl.store(FOUND + TOP * plane + out_at, top, mask=on_rows)
    if DISTANCE >= 0:
        tl.store(FOUND + DISTANCE * plane + out_at, tl.maximum(far * share, 0.0), mask=on_rows)
    if SQUARED >= 0:
        tl.store(FOUND + SQUARED * plane + out_at, farther * share, mask=on_rows)
    if CLIPPED >= 0:
        tl.store(FOUND + CLIPPED * plane + out_at, clipped * share, mask=on_rows)
    if TOTAL >= 0:
        tl.store(FOUND + TOTAL * plane + out_at, total * share, mask=on_rows)
    if GROUPS > 0:
        g = tl.arange(0, 16)
        mass_at = MASS + (pair.to(tl.int64) * GROUPS + g[None, :]) * queries + row[:, None]
        if not REPLAY:
            mass = mass * share[:, None]
        tl.store(mass_at, mass, mask=on_rows[:, None] & (g < GROUPS)[None, :])

    # Single weights: own, previous and first key, then the two of which one is the largest. One dot product per row
    # and key here costs less than a comparison per pair in the walk.
    left_of_two = highest
    for which in tl.static_range(5):
        if PLACE if which > 2 else (OWN if which == 0 else BEFORE if which == 1 else EARLIEST) >= 0:
            column = row + shift
            if which == 1:
                column = row + shift - 1
            if which == 2:
                column = tl.load(FIRST + batch * first_batch + row, mask=on_rows, other=0)
            if which > 2:
                column = best + which - 3
            here = on_rows & (column >= 0) & (column < keys)
            q_again = tl.load(q_at, mask=on_rows[:, None] & (feature < D)[None, :], other=0.0).to(tl.float32)
            k_at = k_base + column.to(tl.int64)[:, None] * k_row + feature[None, :]
            k = tl.load(k_at, mask=here[:, None] & (feature < D)[None, :], other=0.0).to(tl.float32)
            score = tl.sum(q_again * k, 1)
            bias = 0.0
            if BIASED:
                bias_at = BIAS + batch * bias_batch + head * bias_head
                bias_at += row.to(tl.int64) * bias_row + column.to(tl.int64) * bias_column
                bias = tl.load(bias_at, mask=here, other=0.0).to(tl.float32)
            if SLOPED:
                bias -= slope * tl.abs(row + shift - column).to(tl.float32)
            key_flags = 0
            if PADDED or BLOCKED or CLASSES > 1:
                key_flags = tl.load(KEY_FLAGS + batch * key_flags_batch + column, mask=here, other=1)
            one_row_flags = row_flags
            if BLOCKED:
                one_row_flags = tl.load(QUERY_FLAGS + batch * query_flags_batch + row, mask=on_rows, other=0)
                one_row_flags = one_row_flags & tl.load(HEAD_FLAGS + batch * head_flags_batch + head)
            if not FOLDED:
                score = base2(score, bias, inner, cap, outer, CAPPED, BIASED or SLOPED)
            score = hide(
                score, row, column, keys, shift, left, right, key_flags, one_row_flags,
                True, LEFT, RIGHT, PADDED, BLOCKED,
            )  # fmt: skip
            weight = tl.where(score > NOTHING_SEEN, tl.exp2(tl.minimum(score * unit - lse, 0.0)), 0.0)
            if CLASSES > 0:
                weight = edited(
                    weight, row, column, shift, (key_flags >> 16) & 15, FACTOR, queries, factor_at, on_rows, kept,
                    CLASSES,
                )  # fmt: skip
            if which < 3:
                slot_at = (OWN if which == 0 else BEFORE if which == 1 else EARLIEST) * plane
                tl.store(FOUND + slot_at + out_at, weight, mask=on_rows)
            if which > 2 and CLASSES == 0:
                weight = score
            if which == 3:
                left_of_two = weight
            if which == 4:
                tl.store(ARGMAX + out_at, best + (weight > left_of_two).to(tl.int32), mask=on_rows)
