"""`RecurrenceMap`: a linear recurrence over positions as a map, in memory linear in the length.

One formula serves linear attention with decay, the (gated) delta rule and selective state spaces; kernels/reference/
mixers.py states it densely. Products go through the positions in chunks: inside a chunk the map is a small triangle,
between chunks the state [d, c] carries what came before (Yang et al. 2024, arXiv 2412.06464; Dao & Gu 2024, arXiv
2405.21060). The transposed product runs the same chunks backwards with the adjoint state, and rows of the map are
transposed products with unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.kernels.mixers.mixer_map import BLOCK_ELEMENTS, MixerMap
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, OverKeys, OverQueries, Weights

CHUNK = 32  # positions
FORGOTTEN = -1000.0  # log of a decay that is 0 in float64; keeps sums of logs finite where a state is reset


@dataclass(frozen=True, eq=False)
class RecurrenceMap(MixerMap):
    """o_t = S_tᵀ q_t with S_t = a_t ⊙ S_{t-1} + β_t k_t v_tᵀ, as o = A v; signed, causal, exact.

    `q` and `k` [batch, group, position, d]: each group serves as many neighbouring heads. `log_decay` [batch, head,
    position, 1 or d] is log a, at most 0; the one of the first position has no effect. With `rates` [head, d], row n
    of the state decays by log a · rate_n, so that log a takes one number a position. `write` [batch, head, position] is
    β. With `delta` the state is corrected, S_t = (I - β_t k_t k_tᵀ)(a_t ⊙ S_{t-1}) + β_t k_t v_tᵀ.

    >>> import torch
    >>> from headwater.kernels.mixers.recurrence import RecurrenceMap
    >>> one = torch.ones(1, 1, 3, 1)
    >>> map = RecurrenceMap(one, one, one.mul(0.5).log(), one[..., 0])  # a running sum that loses a half at each step
    >>> map.dense()[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    >>> (map @ torch.ones(3, 1))[0, 0, :, 0].tolist()
    [1.0, 1.5, 1.75]
    """

    q: Float[Tensor, "batch group position d"]
    k: Float[Tensor, "batch group position d"]
    log_decay: Float[Tensor, "batch head position d_decay"]
    write: Float[Tensor, "batch head position"]
    delta: bool = False
    rates: Float[Tensor, "head d"] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        batch, heads, length = self.write.shape
        return (batch, heads, length, length)

    def gather(self, x: OverKeys) -> AtQueries:
        """`map @ x`: the recurrence, a chunk at a time."""
        batch, heads, length, _ = self.shape
        out = torch.empty(batch, heads, length, x.shape[-1], dtype=self.q.dtype, device=self.q.device)
        for some in self._together(x.shape[-1]):
            state = self.q.new_zeros(batch, len(some), self.q.shape[-1], x.shape[-1])
            given = (x if x.shape[1] == 1 else x[:, some]).to(out)
            for begin in range(0, length, CHUNK):
                span = slice(begin, min(begin + CHUNK, length))
                chunk = _Chunk.of(self, some, span)
                written = chunk.written(given[:, :, span], state)
                out[:, some, span] = chunk.q_start @ state + chunk.reads @ written
                state = chunk.kept * state + chunk.k_end.mT @ written
        return out

    def scatter(self, y: OverQueries) -> AtKeys:
        """`map.T @ y`: the adjoint recurrence, from the last chunk to the first."""
        batch, heads, length, _ = self.shape
        out = torch.empty(batch, heads, length, y.shape[-1], dtype=self.q.dtype, device=self.q.device)
        for some in self._together(y.shape[-1]):
            given = (y if y.shape[1] == 1 else y[:, some]).to(out)
            for span, found in self._backwards(some, given, 0):
                out[:, some, span] = found
        return out

    def window(self, rows: slice, columns: slice, heads: Tensor) -> Weights:
        """Weights of plain slices and chosen heads, from the rows' last position back to the first asked column."""
        n_rows = rows.stop - rows.start
        out = self.q.new_zeros(self.shape[0], len(heads), n_rows, columns.stop - columns.start)
        unit = out.new_zeros(1, 1, rows.stop, n_rows)
        unit[0, 0, rows.start :] = torch.eye(n_rows, dtype=out.dtype, device=out.device)
        for place in torch.arange(len(heads)).split(self._n_together(n_rows)):
            for span, found in self._backwards(heads[place], unit, columns.start):
                keep = slice(max(span.start, columns.start), min(span.stop, columns.stop))
                if keep.start < keep.stop:
                    inside = found[:, :, keep.start - span.start : keep.stop - span.start].mT
                    out[:, place, :, keep.start - columns.start : keep.stop - columns.start] = inside
        return out

    def _backwards(self, heads: Tensor, y: Tensor, lowest: int) -> Iterator[tuple[slice, Tensor]]:
        """`map.T @ y` chunk by chunk from the end of y down to the position `lowest`, [batch, head, key, c]."""
        state = self.q.new_zeros(self.shape[0], len(heads), self.q.shape[-1], y.shape[-1])
        stop = y.shape[2]
        while stop > lowest:
            span = slice(max(stop - CHUNK, 0), stop)
            chunk, given = _Chunk.of(self, heads, span), y[:, :, span]
            found = chunk.written_back(chunk.reads.mT @ given + chunk.k_end @ state)
            yield span, found
            state = chunk.kept * state + chunk.q_start.mT @ given
            if chunk.corrections is not None:
                state = state - chunk.k_start.mT @ found
            stop = span.start

    def _together(self, width: int) -> Iterator[Tensor]:
        yield from torch.arange(self.shape[1]).split(self._n_together(width))

    def _n_together(self, width: int) -> int:
        """How many heads go through a chunk at once."""
        state = self.q.shape[-1] * max(width, 1)
        each = self.log_decay.shape[-1] if self.rates is None else self.rates.shape[-1]
        inside = CHUNK * CHUNK * each + CHUNK * max(width, 1)
        return max(BLOCK_ELEMENTS // max(self.shape[0] * max(state, inside), 1), 1)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """The parts of the map inside one chunk, [batch, head, position, …], and its ways to the states around it.

    `reads` is QKᵀ ⊙ decay. `q_start` and `k_start` are q and k times the decay since the state before the chunk,
    `k_end` is k times the decay up to the state after it, and `kept` [batch, head, d or 1, 1] the decay of the whole.
    `corrections` is I + tril(diag(β) KKᵀ ⊙ decay, -1) under the delta rule.
    """

    reads: Tensor
    q_start: Tensor
    k_start: Tensor
    k_end: Tensor
    kept: Tensor
    write: Tensor
    corrections: Tensor | None

    @classmethod
    def of(cls, map: RecurrenceMap, heads: Tensor, span: slice) -> _Chunk:
        group = heads // (map.shape[1] // map.q.shape[1])
        q, k, write = map.q[:, group, span], map.k[:, group, span], map.write[:, heads, span, None]
        # differences of sums of logs, in float64: a difference of two large float32 numbers would be all rounding
        step = map.log_decay[:, heads, span].double()
        step = step if map.rates is None else step * map.rates[heads, None].double()
        total = step.clamp_min(FORGOTTEN).cumsum(2)
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        between = (total[:, :, :, None] - total[:, :, None]).masked_fill(future[..., None], -torch.inf)
        between, since = between.to(q).exp(), total.to(q).exp()
        to_end = (total[:, :, -1:] - total).to(q).exp()
        corrections = None
        if map.delta:
            inside = (write * _products(k, k, between)).tril(-1)
            corrections = inside + torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
        return cls(
            _products(q, k, between),
            q * since,
            k * since,
            k * to_end,
            since[:, :, -1:].mT,
            write,
            corrections,
        )

    def written(self, x: Tensor, state: Tensor) -> Tensor:
        """What each position adds to the state along its key, [batch, head, position, c]."""
        if self.corrections is None:
            return self.write * x
        missing = self.write * (x - self.k_start @ state)
        return torch.linalg.solve_triangular(self.corrections, missing, upper=False, unitriangular=True)

    def written_back(self, slope: Tensor) -> Tensor:
        """The transpose of `written` with respect to x."""
        if self.corrections is not None:
            slope = torch.linalg.solve_triangular(self.corrections.mT, slope, upper=True, unitriangular=True)
        return self.write * slope


def _products(q: Tensor, k: Tensor, between: Tensor) -> Tensor:
    """`Σ_n q_in k_jn between_ijn`, [batch, head, position, position]."""
    if between.shape[-1] == 1:
        return (q @ k.mT) * between[..., 0]
    return torch.einsum("bhin,bhjn,bhijn->bhij", q, k, between)
