"""Places of kept tokens: taken and put back, in rows that keep different numbers, and behind a window of a cache."""

from __future__ import annotations

import torch

from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.shortening import Places, Short

KEPT = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1]]) > 0


def test_what_is_put_back_stands_where_it_was_taken():
    x = torch.arange(2 * 3 * 6 * 2.0).reshape(2, 3, 6, 2)
    places = Places.of(KEPT)
    assert places.at.shape == (2, 4)
    assert places.real.sum(-1).tolist() == [4, 2]
    back = places.put(places.taken(x, 2), 2, 6, -1.0)
    kept = KEPT[:, None, :, None].expand_as(x)
    assert back.equal(torch.where(kept, x, torch.tensor(-1.0)))
    assert places.put(places.taken(x, 2), 2, 4, -1.0, first=2).equal(back[:, :, 2:])


def test_the_narrow_mask_shows_the_pairs_of_the_whole_one():
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]) > 0
    places = Places.of(KEPT)
    for right in (0, None):
        whole = Mask(6, 6, None, right, valid_keys=padding, valid_queries=padding)
        short = Short(6, 6, places, places)
        narrow, hidden = short.narrowed(whole), short.hidden(whole)
        assert narrow is not None
        for row in range(2):
            at = places.at[row, places.real[row]]
            small, large = _shown(narrow, row), _shown(hidden, row)
            real = places.real[row]
            assert small[real][:, real].equal(large[at][:, at])
            assert not small[:, ~real].any()
            assert not large[:, ~KEPT[row]].any()
            assert hidden.valid_queries[row].equal(KEPT[row] & padding[row])


def test_a_step_behind_a_cache_sees_what_was_kept_and_what_came_later():
    columns = Places.of(KEPT[:1]).behind(6, 2)
    assert columns.at.tolist() == [[0, 2, 3, 5, 6, 7]]
    step = Short(1, 8, None, columns)
    whole = Mask(1, 8, None, 0, 7)
    assert _shown(step.hidden(whole), 0)[0].nonzero()[:, 0].tolist() == columns.at[0].tolist()
    narrow = step.narrowed(whole)
    assert narrow is not None
    assert _shown(narrow, 0).all()
    assert step.fitting(3).columns.at.tolist() == [[5, 6, 7]]
    assert step.narrowed(Mask(1, 8, 3, 0, 7)) is None, "a window is of the whole sequence"


def _shown(mask: Mask, row: int) -> torch.Tensor:
    block = Block(slice(row, row + 1), torch.zeros(1).long(), slice(0, mask.queries), slice(0, mask.keys))
    tile = mask.tile(block, torch.device("cpu"))
    return (torch.ones(1) > 0 if tile is None else tile).expand(1, 1, mask.queries, mask.keys)[0, 0]
