"""Statistics of plain softmax maps in one lean walk over blocks of whole rows: the fast path of `statistics.compute`.

A block is one product of queries and keys in which the row's log-sum-exp rides as one more feature, one multiplication
by the scale and log2(e), one exponential, and about one cheap sweep for each statistic. A thread takes the blocks of
some heads, or of some rows of one head, and waits for no other. Scaling after the product and not before it keeps the
digits of large scores: the queries are not rounded again. torch's exp2 and its multiplication are faster than exp
alone. It works if the scores are `scale * q·k`, under any mask. Score edits, weight edits, soft-caps, biases and other
normalisers take the general walk in kernels/maps/statistics.py. Memory: for each thread two blocks, 8 MB in float32,
and copies of the queries and keys of the heads in hand.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.kernels.maps.measures import of_rows, one_per_row
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.threads import mapped
from headwater.kernels.tiles import row_blocks
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

NAMES = (
    "entropy", "max", "argmax", "self", "previous", "first", "distance", "row_mass", "received",
    "distance_squared", "windowed_distance",
)  # fmt: skip
BLOCKS = 2  # usual ones in one: smaller ones are lost in the cost of calling torch, larger ones in the cache
MOST_ROWS = 256  # more rows only make the triangle larger that a causal block computes in vain
LOG2E = math.log2(math.e)
HIDDEN_LOG = -1e30  # of a hidden weight: finite, so that 0 times it is 0
PART = (
    2**21
)  # weights in a part at least, beyond the first few parts: what one costs beside them is then little
PARTS = 8, 64  # of a map that is not small, at least and at most: some for each thread
SMALL = 2**18  # weights that are sooner computed here than given to other threads
STRIP = 64  # columns whose maximum is looked at together in the search for the largest


class Piece(NamedTuple):
    """Rows of a map and the columns that the band lets them see."""

    rows: slice
    columns: slice


def takes(map: MapState) -> bool:
    """Whether the weights of this map are a plain softmax of scaled products."""
    rule = map.rule
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (map.q, map.k, map.lse))
    linear = rule.softcap is None and rule.bias is None and rule.alibi is None and rule.scale > 0
    return rule.normaliser is None and linear and not rule.edits and not map.steps and not learning


def stream(map: MapState, names: list[str], found: dict[str, Tensor], window: int) -> None:
    """Fill `found[name]`, which come as zeros; rows without weights are left to the caller.

    `window` is where `windowed_distance` clips (tokens).
    """
    batch, heads = map.shape[:2]
    pieces = _pieces(map)
    largest = max((_size(piece) for piece in pieces), default=1)
    most = BLOCKS * row_blocks.BLOCK_ELEMENTS
    some_heads = min(max(most // largest, 1), heads)
    some_rows = min(max(most // (largest * heads), 1), batch)
    walk = _Walk(map, names, found, window, some_rows * some_heads * largest)
    where = [
        (slice(i, min(i + some_rows, batch)), slice(j, min(j + some_heads, heads)))
        for i in range(0, batch, some_rows)
        for j in range(0, heads, some_heads)
    ]
    total = batch * heads * sum(_size(piece) for piece in pieces)
    # from the size alone, so that the sums do not depend on the number of threads
    runs = _runs(pieces, -(-min(max(total // PART, PARTS[0]), PARTS[1]) // max(len(where), 1)))
    parts = [Part(b, h, run) for b, h in where for run in runs]
    each = (walk.of(part) for part in parts) if total < SMALL else mapped(walk.of, parts, map.q.device)
    for part, received in zip(parts, each, strict=True):
        if received is not None:
            # one after another in a fixed order, so that the sum is the same bit for bit
            total = found["received"][part.batch, part.heads]
            if total.device.type == "cpu":
                # By numpy, as torch would wake its own threads for each sum, and they then hold the cores of those
                # that walk for some milliseconds.
                np.add(total.numpy(), received.numpy(), out=total.numpy())
            else:
                total += received


class Part(NamedTuple):
    """What one thread computes without waiting for another: some pieces of the maps of some heads."""

    batch: slice
    heads: slice
    pieces: list[Piece]


class _Walk:
    """The walk over the parts of a map. Parts have no rows in common, so threads may take them side by side."""

    def __init__(
        self, map: MapState, names: list[str], found: dict[str, Tensor], window: int, largest: int
    ) -> None:
        batch, heads, _, keys = map.shape
        self.map, self.names, self.found, self.window, self.largest = map, names, found, window, largest
        self.first = (
            map.mask.first_visible(batch, heads).expand(batch, heads, -1) if "first" in names else None
        )
        self.only = _only(self.first, keys)
        self.weighed = not set(names) <= {
            "max",
            "argmax",
        }  # whether more than the largest weights is asked for
        self.own = threading.local()

    def of(self, part: Part) -> Tensor | None:
        """Fill the statistics of the part's rows; gives what its keys received from them, [batch, head, key]."""
        map, rule, high = self.map, self.map.rule, self.map.dtype
        b, h, pieces = part
        keys = map.shape[3]
        chosen = torch.arange(h.start, h.stop)
        # One more feature carries the row's log-sum-exp through the product: with q' = [q_i, -lse_i / scale] and
        # k' = [k_j, 1],  scale * q'·k' = scale * q_i·k_j - lse_i = ln p_ij,  and no subtraction per pair is left.
        # A row without weights gets -1e30 there, so that its weights are exp(-1e30) = 0. The queries themselves
        # are left unscaled, as scaling rounds them.
        lse = map.lse[b, h, :, None].to(high)
        start = torch.where(torch.isinf(lse), HIDDEN_LOG, lse / -rule.scale)
        q = torch.cat([map.q[b, h].to(high), start], -1)
        group = map.q.shape[1] // map.k.shape[1]
        # heads that share keys are rows of one product, where the part has all of them
        shared = group if h.start % group == h.stop % group == 0 else 1
        k = map.k[b][:, chosen // group] if shared < group else map.k[b, h.start // group : h.stop // group]
        k = torch.nn.functional.pad(k.to(high), (0, 1), value=1.0)
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        scratch, rims = self._of_this_thread(q)
        results = {name: self.found[name][b, h].flatten(0, 1) for name in self.names if name != "received"}
        received = q.new_zeros(len(q), keys) if "received" in self.names else None
        for piece in pieces:
            rows, columns = piece
            shape = (len(q), rows.stop - rows.start, columns.stop - columns.start)
            logs, weights = (half[: math.prod(shape)].view(shape) for half in scratch)
            by_keys = (len(k), shared * shape[1])
            torch.bmm(q[:, rows].reshape(*by_keys, -1), k[:, columns].mT, out=logs.view(*by_keys, -1))
            _hide(rule.mask, Block(b, chosen, rows, columns), logs, rims)
            at = {n: x[:, rows] for n, x in results.items()}
            _measure(logs, weights, at, piece, rule, self.window, self.weighed)
            if received is not None:
                received[:, columns] += weights.sum(-2)
            if self.only is not None and columns.start <= self.only < columns.stop:
                at["first"].copy_(weights[..., self.only - columns.start])
            elif self.first is not None:
                place = self.first[b, h, rows].reshape(shape[:2]).to(weights.device) - columns.start
                at["first"].copy_(one_per_row(weights, place))
        if received is None:
            return None
        return received.unflatten(0, (b.stop - b.start, -1)).to(self.found["received"])

    def _of_this_thread(self, like: Tensor) -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        """Two blocks to write over, and the masks of rims that were made before."""
        if not hasattr(self.own, "scratch"):
            self.own.scratch, self.own.rims = like.new_empty(2, self.largest), {}
        return self.own.scratch, self.own.rims


def _runs(pieces: list[Piece], count: int) -> list[list[Piece]]:
    """The pieces in so many runs of about one size, or as many as there are pieces."""
    runs = max(min(count, len(pieces)), 1)
    share = sum(_size(piece) for piece in pieces) / runs
    found, done = [[] for _ in range(runs)], 0
    for piece in pieces:
        found[min(int(done / share), runs - 1)].append(piece)
        done += _size(piece)
    return [run for run in found if run]


def _pieces(map: MapState) -> list[Piece]:
    mask, pieces, begin = map.mask, [], 0
    while begin < mask.queries:
        count = min(MOST_ROWS, mask.queries - begin)
        span = mask.key_span(begin, begin + count)
        while count > 16 and count * (span[1] - span[0]) > BLOCKS * row_blocks.BLOCK_ELEMENTS:
            count //= 2
            span = mask.key_span(begin, begin + count)
        if span[0] < span[1]:
            pieces.append(Piece(slice(begin, begin + count), slice(*span)))
        begin += count
    return pieces


def _size(piece: Piece) -> int:
    return (piece.rows.stop - piece.rows.start) * (piece.columns.stop - piece.columns.start)


def _hide(mask: Mask, block: Block, logs: Tensor, rims: dict[tuple[int, ...], Tensor]) -> None:
    """Hide pairs in `logs`. Under a plain band only its rims are visited; `rims` keeps their masks for other heads."""
    heads, rows, columns = block.heads, block.rows, block.columns
    begin, end = mask.interior(rows, columns)
    whole = end <= begin
    for part in [columns] if whole else [slice(columns.start, begin), slice(end, columns.stop)]:
        if part.start == part.stop:
            continue
        key = (rows.stop - rows.start, part.stop - part.start, rows.start - part.start)
        rim = rims.get(key)
        if rim is None:
            visible = mask.tile(block._replace(columns=part), logs.device)
            if visible is None:
                continue
            rim = torch.zeros_like(visible, dtype=logs.dtype).masked_fill_(~visible, HIDDEN_LOG)
            if mask.is_band and mask.valid_keys is None:
                rims[key] = rim
        inside = logs[..., part.start - columns.start : part.stop - columns.start]
        inside.unflatten(0, (-1, len(heads))).add_(rim)


def _measure(
    logs: Tensor, weights: Tensor, at: dict[str, Tensor], piece: Piece, rule: ScoreRule, window: int,
    weighed: bool,
) -> None:  # fmt: skip
    """Everything but `first`, from logarithms of the weights over the scale; writes over both scratch tensors, the
    weights if they are `weighed`."""
    rows, columns = piece
    mask, unit = rule.mask, rule.scale * LOG2E
    excess = True
    if "max" in at or "argmax" in at:
        peak, place = _largest(logs)
        excess = peak.amax().item() > 0
        if "argmax" in at:
            at["argmax"].copy_(place.add_(columns.start))
        if "max" in at:
            at["max"].copy_(peak.clamp_(max=0).mul_(unit).exp2_())
    if not weighed:
        return
    if excess:
        # no weight exceeds 1: at scores of 1e4 the rounding of another kernel's lse would say otherwise
        logs.clamp_(max=0)
    # exp(scale * x) = 2^(scale * log2(e) * x)
    torch.exp2(logs.mul_(unit), out=weights)
    if "entropy" in at:
        # -sum_j w ln w, from logarithms to base 2; 0 * -1e30 of a hidden pair is 0
        at["entropy"].copy_(torch.mul(weights, logs, out=logs).sum(-1).mul_(-1 / LOG2E))
    ahead = rows.start + mask.shift - columns.start
    one_sided = mask.right is not None and mask.right <= 0
    for name, values in of_rows(weights, at, ahead, one_sided, window, logs).items():
        at[name].copy_(values)


def _largest(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each row and its column, the first of equals: maxima of strips first, then inside the best strip."""
    width = logs.shape[-1]
    whole = width // STRIP * STRIP
    if width < 4 * STRIP:
        return logs.max(-1)
    strips = logs[..., :whole].unflatten(-1, (-1, STRIP)).amax(-1)
    if whole < width:
        strips = torch.cat([strips, logs[..., whole:].amax(-1, keepdim=True)], -1)
    best = strips.argmax(-1)
    if whole == width:
        # strips lie one after another: those wanted are rows of a table, which costs less than a gather
        table = logs.view(-1, STRIP)
        inside = table[torch.arange(best.numel(), device=logs.device) * (width // STRIP) + best.flatten()]
        peak, place = inside.view(*best.shape, STRIP).max(-1)
        return peak, place.add_(best, alpha=STRIP)
    begin = best[..., None] * STRIP
    columns = (begin + torch.arange(STRIP, device=logs.device)).clamp_(max=width - 1)
    peak, place = logs.gather(-1, columns).max(-1)
    return peak, place.add_(begin[..., 0])


def _only(first: Tensor | None, keys: int) -> int | None:
    """The column that is the first visible key of every row, where there is one such."""
    if first is None or not first.numel():
        return None
    low, high = first.aminmax()
    return int(low) if low == high and low < keys else None
