"""ALiBi as a bias by distance, also where a cache has moved.

Mutation seen to fail here: ALiBi without the cache's offset.
"""

from __future__ import annotations

import torch
from comparison import near
from small_maps import CAUSAL, FULL, HEADS, N, dense, map_of, problem

from headwater.kernels.tiles.mask import Mask


def test_alibi_is_a_bias_by_distance_and_moves_with_the_cache():
    q, k, v = problem()
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
    far = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    bias = -slopes[None, :, None, None] * far
    for mask in (CAUSAL, FULL):
        near(dense(map_of(mask, None, alibi=slopes)), dense(map_of(mask, None, bias=bias)), 1e-7)
    # as models write it, with the last key at 0: the same weights behind a causal mask
    written = slopes[None, :, None, None] * (torch.arange(N) - N + 1)
    near(dense(map_of(CAUSAL, None, alibi=slopes)), dense(map_of(CAUSAL, None, bias=written)), 1e-6)
    late = Mask(2, N - 3, right=0, query_offset=N - 2, key_offset=3)
    part = dense(map_of(late, None, (q[:, :, -2:], k[:, :, 3:], v[:, :, 3:]), alibi=slopes))
    whole = dense(map_of(CAUSAL, None, alibi=slopes))[:, :, -2:, 3:]
    near(part, whole / whole.sum(-1, keepdim=True), 1e-12)
