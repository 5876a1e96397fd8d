"""The numbers of one text, head by head, from blocks of rows of its maps: memory is linear in the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._corpora.statistics import (
    BINS,
    DISTANCES,
    HEADVIS_LEAST,
    SUNK,
    bins_of,
)
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.records import sinks

ELEMENTS = 2**22  # weights of one block of rows, over all heads


@dataclass(frozen=True, eq=False)
class Numbers:
    """One layer of one text: float64 sums and exact counts, and the row or key where each statistic is largest.

    `sums`, `counts`, `best`, `query`, `key` [statistic, head]; `bins` [statistic, head, bin]; `distances`
    [head, bin], weight by |query - key|; `headvis` [number, head]; `given` and `taken` [token, head], weight by token
    of the query and of the key, without what goes to the first token; `activation` [head], the largest weight between
    tokens that are not the first.
    """

    sums: np.ndarray
    counts: np.ndarray
    bins: np.ndarray
    best: np.ndarray
    query: np.ndarray
    key: np.ndarray
    distances: np.ndarray
    headvis: np.ndarray
    given: np.ndarray
    taken: np.ndarray
    activation: np.ndarray


@dataclass(frozen=True, eq=False)
class Text:
    """The token ids of one text, int64 [position], and what every layer asks about them."""

    ids: Tensor

    @cached_property
    def kinds(self) -> tuple[Tensor, Tensor]:
        """The different tokens, in their order, and which of them stands at each position."""
        return torch.unique(self.ids, return_inverse=True)

    @cached_property
    def repeated(self) -> Tensor:
        """Whether the token stood in the text before, [position]."""
        order = torch.argsort(self.ids, stable=True)
        same = torch.zeros_like(order, dtype=torch.bool)
        same[1:] = self.ids[order][1:] == self.ids[order][:-1]
        return torch.zeros_like(same).index_put((order,), same)

    @cached_property
    def before(self) -> Tensor:
        """The token before each position, -1 at the first."""
        return torch.nn.functional.pad(self.ids[:-1], (1, 0), value=-1)

    @cached_property
    def by_distance(self) -> Tensor:
        """Of each distance from -(n - 1) to n - 1: its bin as a one among zeros, |d| and d², [distance, number]."""
        n = len(self.ids)
        far = torch.arange(1 - n, n, device=self.ids.device).abs()
        bins = torch.bucketize(far, torch.tensor(DISTANCES, device=far.device), right=True) - 1
        ones = torch.nn.functional.one_hot(bins, _bins(n)).float()
        return torch.cat([ones, far[:, None].float(), far[:, None].float().square()], 1)

    def pairs(self, rows: slice, columns: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Rows and columns in a block of keys that are earlier copies of the query, and of keys that follow one."""
        query = torch.arange(rows.start, rows.stop, device=self.ids.device)[:, None]
        key = torch.arange(columns.start, columns.stop, device=self.ids.device)
        own = self.ids[rows, None]
        copies = ((self.ids[columns] == own) & (key < query)).nonzero()
        follow = ((self.before[columns] == own) & (key <= query)).nonzero()
        return (copies[:, 0], copies[:, 1]), (follow[:, 0], follow[:, 1])


def _bins(length: int) -> int:
    return int(np.searchsorted(DISTANCES, length - 1, side="right"))


def of_layer(map: AttentionMap, text: Text) -> Numbers:
    """The numbers of one layer; `map` is of this text alone, without padding, and has no negative weights."""
    n = len(text.ids)
    whole = map.tile(slice(0, n), slice(0, n))[0] if map.shape[1] * n * n <= ELEMENTS else None
    received = (map.received()[0] if whole is None else whole.sum(-2)).float()
    visible = map.visible()[0].expand_as(received)
    share = torch.where(sinks.seen_enough(visible, "share"), received / visible, torch.nan)
    sunk = share > sinks.SHARE
    share[:, 0] = torch.nan
    top = share.nan_to_num(-1).argmax(-1)
    parts = [_of_rows(w, rows, columns, text, sunk, top) for rows, columns, w in _blocks(map, whole)]
    values, keys, column, extra = (torch.cat([part[i] for part in parts], -1) for i in range(4))
    seen = map.rule.mask.visible_keys(1, map.shape[1]).expand(1, map.shape[1], n)[0].to(values.device)
    values = torch.where(seen > 1, values, torch.nan)  # a row that sees one key says nothing
    every = torch.cat([values, share[None]]).cpu().numpy()
    best, at = _largest(every)
    key = np.take_along_axis(keys.cpu().numpy(), at[:-1, :, None], -1)[..., 0]
    query = at.copy()
    query[-1] = column.argmax(-1).cpu().numpy()
    _, place = text.kinds
    taken = received.clone()
    taken[:, 0] = 0
    return Numbers(
        sums=np.asarray(np.nansum(every, -1, dtype=np.float64)), counts=(~np.isnan(every)).sum(-1),
        bins=_counted(bins_of(every)), best=best, query=query, key=np.concatenate([key, at[-1:]]),
        distances=_padded(torch.stack([part[4] for part in parts]).sum(0)),
        headvis=extra[:-1].double().sum(-1).cpu().numpy(), given=_by_token(extra[-1], place),
        taken=_by_token(taken, place), activation=np.where(np.isnan(best[0]), 0, best[0]),
    )  # fmt: skip


def _blocks(map: AttentionMap, whole: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of rows over the keys that they see, [head, row, key]."""
    _, heads, n, keys = map.shape
    if whole is not None:
        yield slice(0, n), slice(0, keys), whole
        return
    step = max(ELEMENTS // (heads * keys), 1)
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        columns = slice(*map.mask.key_span(rows.start, rows.stop))
        yield rows, columns, map.tile(rows, columns)[0]


def _of_rows(
    w: Tensor, rows: slice, columns: slice, text: Text, sunk: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a block of rows: statistics and their keys [statistic, head, row], the weight on one key of each head
    [head, row], the numbers of HeadVis and what does not go to the first token [number, head, row], and the weight by
    distance [head, bin]."""  # fmt: skip
    heads, count = w.shape[:2]
    query = torch.arange(rows.start, rows.stop, device=w.device)
    kept = (~sunk[:, columns]).float()
    total = w.sum(-1)
    first = w[..., 0] if columns.start == 0 else torch.zeros_like(total)
    skip = max(1 - columns.start, 0)
    weight, at = _strongest(w[..., skip:])
    at = at + columns.start + skip
    far = _by_distance(w, rows, columns, text)
    own = [_at(w, query - back, columns) for back in (0, 1)]
    free_own = [_at(w * kept[:, None], query - back, columns) for back in (0, 1)] if sunk.any() else own
    copies, follow = text.pairs(rows, columns)
    of_pairs = [_of_pairs(w, kept, pairs, columns.start) for pairs in (copies, follow)]
    left = (w @ kept[..., None])[..., 0]
    aside = total - left if sunk.any() else torch.zeros_like(total)
    free = torch.where(left > SUNK, left, torch.nan)
    entropy = torch.special.entr(w).sum(-1)
    (same, same_free, same_key, _), (next_, next_free, next_key, counted) = of_pairs
    rows_of = [
        weight, entropy, far[..., -2], first, own[0], own[1], same, next_, aside,
        free_own[0] / free, free_own[1] / free, same_free / free, next_free / free,
    ]  # fmt: skip
    values = torch.stack(rows_of)
    repeated = text.repeated[rows]
    never = torch.full_like(values, torch.nan)
    later, again = (query > 0).expand(heads, count), repeated.expand(heads, count)
    for number, counts in (
        (0, later),
        (3, later),
        (5, later),
        (10, later),
        (6, again),
        (7, again),
        (11, again),
        (12, again),
    ):
        values[number] = torch.where(counts, values[number], never[number])
    here, zero = query.expand(heads, count), torch.zeros_like(at)
    keys = torch.stack(
        [at, at, at, zero, here, here - 1, same_key, next_key, at, here, here - 1, same_key, next_key]
    )
    place = (top - columns.start)[:, None, None].expand(heads, count, 1)
    inside = (place >= 0) & (place < w.shape[-1])
    column = torch.where(inside, w.gather(-1, place.clamp(0, w.shape[-1] - 1)), -1)[..., 0]
    extra = torch.stack([own[0], own[1], entropy, far[..., -2], far[..., -1], counted, total - first])
    return values, keys, column, extra, far[..., :-2].sum(1)


def _strongest(w: Tensor) -> tuple[Tensor, Tensor]:
    if not w.shape[-1]:
        return w.new_zeros(w.shape[:-1]), torch.zeros(w.shape[:-1], dtype=torch.long, device=w.device)
    found = w.max(-1)
    return found.values, found.indices


def _at(w: Tensor, key: Tensor, columns: slice) -> Tensor:
    """The weight of each row on one key, 0 where the block does not hold it, [head, row]."""
    place = key - columns.start
    inside = (place >= 0) & (place < w.shape[-1])
    found = w.gather(-1, place.clamp(0, w.shape[-1] - 1)[None, :, None].expand(len(w), -1, 1))[..., 0]
    return torch.where(inside, found, 0)


def _by_distance(w: Tensor, rows: slice, columns: slice, text: Text) -> Tensor:
    """Σ over the keys of the weight times the numbers of its distance, [head, row, number].

    Numbers depend on key - query alone. So with the rows in reverse order the table of each row begins one entry after
    the last row's, and one table is a view of all of them.
    """
    table = text.by_distance
    count, keys, numbers = w.shape[1], columns.stop - columns.start, table.shape[1]
    begin = columns.start - (rows.stop - 1) + len(text.ids) - 1
    each = table.as_strided((count, keys, numbers), (numbers, numbers, 1), begin * numbers)
    return torch.bmm(w.flip(1).transpose(0, 1), each).flip(0).transpose(0, 1)


def _of_pairs(
    w: Tensor, kept: Tensor, pairs: tuple[Tensor, Tensor], start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of chosen pairs: a row's weight on them, that without sinks, their strongest key, and the weight of those that
    are not below `HEADVIS_LEAST`, each [head, row]."""  # fmt: skip
    row, key = pairs
    found = w[:, row, key]
    empty = w.new_zeros(w.shape[:2])
    spread = row.expand_as(found)
    largest = empty.scatter_reduce(1, spread, found, "amax")
    chosen = torch.where(found == largest[:, row], key + start, -1)
    strongest = torch.full_like(empty, -1, dtype=torch.long).scatter_reduce(1, spread, chosen, "amax")
    sums = [
        empty.index_add(1, row, part)
        for part in (found, found * kept[:, key], torch.where(found < HEADVIS_LEAST, 0, found))
    ]
    return sums[0], sums[1], strongest, sums[2]


def _largest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest number and where it is first, over the last axis; NaN where there is none."""
    at = np.where(np.isnan(values), -np.inf, values).argmax(-1)
    return np.take_along_axis(values, at[..., None], -1)[..., 0], at


def _counted(bins: np.ndarray) -> np.ndarray:
    """How many numbers lie in each bin, [statistic, head, bin]."""
    statistics, heads, _ = bins.shape
    cell = np.arange(statistics * heads).reshape(statistics, heads, 1) * BINS + bins
    found = np.bincount(cell[bins >= 0], minlength=statistics * heads * BINS)
    return found.reshape(statistics, heads, BINS)


def _padded(distances: Tensor) -> np.ndarray:
    found = np.zeros((len(distances), len(DISTANCES) - 1))
    found[:, : distances.shape[1]] = distances.double().cpu().numpy()
    return found


def _by_token(mass: Tensor, place: Tensor) -> np.ndarray:
    """Weight [head, position] by token, [token, head]."""
    found = torch.zeros(int(place.max()) + 1, len(mass), dtype=torch.float64, device=mass.device)
    return found.index_add(0, place, mass.double().T).cpu().numpy()
