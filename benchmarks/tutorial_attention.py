"""Plain fused attention in Triton, as its tutorial teaches it: the peer that our forward kernel is measured against.

The algorithm and the order of the loops are those of Triton's tutorial 06, fused attention (OpenAI kernel team, MIT
licence, https://github.com/triton-lang/triton), which is FlashAttention-2 (Dao 2023). The code is written anew with
plain pointers: block pointers are gone from Triton 3.9, and older releases have no tensor descriptors. Output and
log-sum-exp, forward only, heads of 64 or 128, as many keys as queries, no tails: lengths are multiples of 128. Checked
against dense float64 by `gpu.py` before anything is timed, and in the interpreter by the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows, columns, warps, stages: of the sizes that the tutorial searches, those that compiled without spills at a width
CANDIDATES = ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3))
_best: dict[tuple[int, bool, torch.dtype], tuple[int, int, int, int]] = {}


@triton.jit
def _walk(
    accumulator, total, highest, q, k_at, v_at, row, line, begin, end, step, scale,
    BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns `begin:end` of one block of rows; DIAGONAL masks what lies ahead."""
    k_at += begin.to(tl.int64) * step
    v_at += begin.to(tl.int64) * step
    for start in range(begin, end, BLOCK_N):
        k, v = tl.load(k_at), tl.load(v_at)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = tl.dot(q, tl.trans(k)) * scale
        if DIAGONAL:
            score = tl.where(row[:, None] >= start + line[None, :], score, -1.0e30)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, 1)
        accumulator = tl.dot(weight.to(v.dtype), v, accumulator * shrink[:, None])
        highest = higher
        k_at += BLOCK_N * step
        v_at += BLOCK_N * step
    return accumulator, total, highest


@triton.jit
def _forward(
    Q, K, V, Z, LSE, scale, length,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head; q, k, v and z are contiguous [batch * head, length, D]."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, line, feature = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    head_at = pair * length * D
    tile = row[:, None] * D + feature[None, :]
    q = tl.load(Q + head_at + tile)
    if UPCAST:
        q = q.to(tl.float32)
    others = line[:, None] * D + feature[None, :]
    accumulator = tl.zeros([BLOCK_M, D], tl.float32)
    total, highest = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], -1.0e30, tl.float32)
    scale *= 1.4426950408889634
    clear = block * BLOCK_M if CAUSAL else length
    accumulator, total, highest = _walk(
        accumulator, total, highest, q, K + head_at + others, V + head_at + others, row, line,
        clear * 0, clear, D, scale, BLOCK_N, False, UPCAST,
    )  # fmt: skip
    if CAUSAL:
        accumulator, total, highest = _walk(
            accumulator, total, highest, q, K + head_at + others, V + head_at + others, row, line,
            clear, clear + BLOCK_M, D, scale, BLOCK_N, True, UPCAST,
        )  # fmt: skip
    tl.store(Z + head_at + tile, (accumulator / total[:, None]).to(Z.dtype.element_ty))
    tl.store(LSE + pair * length + row, (highest + tl.log2(total)) * 0.6931471805599453)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, tile: tuple[int, int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """z like q, and lse [batch, head, query] in natural logarithm; all heads of equal number and width."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    rows, columns, warps, stages = tile or _best.get((q.shape[-1], causal, q.dtype), CANDIDATES[0])
    length = q.shape[2]
    if length % max(rows, columns):
        raise ValueError(
            f"the tutorial's kernel takes multiples of {max(rows, columns)} tokens; got {length}"
        )
    z, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    upcast = q.device.type == "cpu" and q.dtype == torch.bfloat16  # the interpreter multiplies bit patterns
    _forward[(length // rows, q.shape[0] * q.shape[1])](
        q,
        k,
        v,
        z,
        lse,
        scale,
        length,
        q.shape[-1],
        rows,
        columns,
        causal,
        upcast,
        num_warps=warps,
        num_stages=stages,
    )
    return z, lse


def tune(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[int, int, int, int]:
    """The fastest candidate on these tensors, kept for their width, mask and type; needs a GPU."""
    times = {}
    for tile in CANDIDATES:
        try:
            times[tile] = triton.testing.do_bench(lambda t=tile: attend(q, k, v, causal, scale, t), rep=20)
        except RuntimeError:  # more shared memory or registers than this GPU has
            continue
    _best[q.shape[-1], causal, q.dtype] = min(times, key=times.__getitem__)
    return _best[q.shape[-1], causal, q.dtype]
