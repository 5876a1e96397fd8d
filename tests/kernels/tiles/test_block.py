"""A block picks out of tensors for the whole map what belongs to its rows, heads, keys and batch.

Layouts over heads (`heads.py`) are tested beside it. Mutations seen to fail here: batch rows picked by the number of
the head, chosen columns of the first row for all rows.
"""

from __future__ import annotations

import torch

from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.heads import per_batch_row, per_query_head

BLOCK = Block(slice(1, 3), torch.tensor([2, 0]), slice(3, 5), slice(1, 4))
ROW = torch.tensor([[0], [10], [20]])  # of each batch row


def test_heads_come_in_the_order_of_the_block():
    per_head = torch.tensor([5, 6, 7])
    assert BLOCK.of_heads(per_head).tolist() == [[[[7]], [[5]]]]
    assert BLOCK.of_heads(ROW + per_head)[..., 0, 0].tolist() == [[17, 15], [27, 25]]
    assert BLOCK.of_maps(ROW + per_head).tolist() == [[17, 15], [27, 25]]


def test_queries_keys_and_batch_rows():
    columns = torch.arange(6)
    assert BLOCK.of_queries(ROW + columns)[:, 0, :, 0].tolist() == [[13, 14], [23, 24]]
    assert BLOCK.of_keys(ROW + columns)[:, 0, 0].tolist() == [[11, 12, 13], [21, 22, 23]]
    assert BLOCK.of_keys(columns[None]).tolist() == [[[[1, 2, 3]]]]
    assert BLOCK.of_batch(ROW).tolist() == [[10], [20]]


def test_positions_are_row_and_column_numbers():
    rows, columns = BLOCK.positions(torch.device("cpu"))
    assert (rows + 100 * columns).tolist() == [[[[103, 203, 303], [104, 204, 304]]]]


def test_layouts_over_heads():
    of_keys = torch.tensor([[[1], [2]]])  # two key heads
    assert per_query_head(of_keys, 4)[0, :, 0].tolist() == [1, 1, 2, 2]
    assert per_query_head(of_keys, 2) is of_keys
    assert per_batch_row(torch.tensor([1, 2])).tolist() == [[1, 2]]
    assert per_batch_row(ROW) is ROW


def test_chosen_columns_are_read_row_by_row():
    chosen = torch.tensor([[1, 3], [2, 2]])[None, None]
    block = BLOCK._replace(chosen=chosen)
    whole = torch.arange(3 * 3 * 6 * 5).reshape(3, 3, 6, 5)  # [batch, head, query, key]
    expected = whole[1:3][:, [2, 0], 3:5].gather(3, chosen.expand(2, 2, 2, 2))
    assert torch.equal(block.of_pairs(whole), expected)
    one_row = whole[:, :, :1].expand(whole.shape)
    assert torch.equal(block.of_pairs(whole[:, :, :1]), block.of_pairs(one_row))
    assert block.of_keys(ROW + torch.arange(6))[:, 0].tolist() == [[[11, 13], [12, 12]], [[21, 23], [22, 22]]]
    assert block.positions(torch.device("cpu"))[1] is chosen
    assert block.size == (2, 2)
