"""Every rule of pairs against its definition pair by pair, and Swin's shifted windows against its cyclic shift.

Seen to fail: a neighbourhood that is not moved inside, windows shifted the other way, a document that sees its
children, places counted from the first token of batch row 0.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from comparison import near

from headwater.kernels.attend import attend
from headwater.kernels.edits.scores import MaskScores
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.pair_rules import (
    BlockList,
    ChosenBlocks,
    Dilated,
    Grouped,
    Listed,
    Near,
    Neighbourhood,
    PairRule,
    Streaming,
    Tree,
    Windows,
)

N, FIRST, SIZES = 27, 2, (2, 3, 4)
CELLS = list(itertools.product(*(range(n) for n in SIZES)))  # the grid's cells, of which FIRST come before
ZERO = torch.zeros(2, 1, dtype=torch.long)
GENERATOR = torch.Generator().manual_seed(2)
SHOWN = torch.rand(2, 3, 20, 22, generator=GENERATOR) < 0.5
BLOCKS = torch.rand(6, 5, generator=GENERATOR) < 0.5
DOCUMENTS = torch.tensor([-1, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, -1, 3, 3, 3, 3])
ABOVE = {1: {0, 1}, 0: {0}, 2: {0, 1, 2}, 3: {0, 3}}
BELOW = torch.tensor([[j in ABOVE[i] for j in range(4)] for i in range(4)])


def cell(place: int) -> tuple[int, ...] | None:
    return CELLS[place - FIRST] if 0 <= place - FIRST < len(CELLS) else None


def on_grid(rule):
    def seen(b, h, i, j):
        a, c = cell(i), cell(j)
        return (
            a is None
            or c is None
            or all(rule(axis, *pair) for axis, pair in enumerate(zip(a, c, strict=True)))
        )

    return seen


def nearest(axis: int, i: int, j: int) -> bool:
    """The cells of i's own phase, sorted by distance as NATTEN does: the window around i, moved inside."""
    size, kernel, step = SIZES[axis], (1, 3, 2)[axis], (2, 1, 2)[axis]
    line = [c for c in range(size) if c % step == i % step]
    begin = line.index(i) - kernel // 2
    begin = max(0, min(begin, len(line) - kernel))
    return j in line[begin : begin + kernel]


def document(place: int) -> int:
    return int(DOCUMENTS[place]) if place < len(DOCUMENTS) else -1


def in_tree(b, h, i, j):
    a, c = document(i), document(j)
    return a < 0 or c < 0 or c in ABOVE[a]


RULES = {
    "streaming": (Streaming(ZERO, 2, 3), lambda b, h, i, j: j < 2 or i - j < 3),
    "grouped": (
        Grouped(ZERO, 4, 1, 2),
        lambda b, h, i, j: (i + 1) // 4 == (j + 1) // 4 or j < 2 or i < 2,
    ),
    "dilated": (Dilated(ZERO, 2, 3), lambda b, h, i, j: abs(i - j) in (0, 3, 6)),
    "windows": (
        Windows(ZERO, FIRST, SIZES, (1, 2, 3), (0, 1, 2)),
        on_grid(lambda a, i, j: (i - (0, 1, 2)[a]) // (1, 2, 3)[a] == (j - (0, 1, 2)[a]) // (1, 2, 3)[a]),
    ),
    "near": (Near(ZERO, FIRST, SIZES, (1, 0, 2)), on_grid(lambda a, i, j: abs(i - j) <= (1, 0, 2)[a])),
    "neighbourhood": (Neighbourhood(ZERO, FIRST, SIZES, (1, 3, 2), (2, 1, 2)), on_grid(nearest)),
    "tree": (Tree(ZERO, DOCUMENTS, BELOW), in_tree),
    "blocks": (
        BlockList(ZERO, 5, BLOCKS),
        lambda b, h, i, j: i // 5 >= 6 or j // 5 >= 5 or bool(BLOCKS[i // 5, j // 5]),
    ),
    "listed": (Listed(ZERO, SHOWN), lambda b, h, i, j: i >= 20 or j >= 22 or bool(SHOWN[b, h, i, j])),
    "chosen": (
        ChosenBlocks(ZERO, 5, 0, SHOWN[..., :6].repeat(1, 1, 2, 1)[:, :, :N]),
        lambda b, h, i, j: bool(SHOWN[b, h, i % 20, j // 5]),
    ),
}


def every_pair(rule: PairRule, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    shown = rule(torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None], queries[:, None], keys)
    return shown.expand(2, 3, len(queries), len(keys))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_definition_pair_by_pair(name):
    rule, definition = RULES[name]
    places = torch.arange(N)
    expected = torch.tensor(
        [[[[definition(b, h, i, j) for j in range(N)] for i in range(N)] for h in range(3)] for b in range(2)]
    )
    assert every_pair(rule, places, places).equal(expected)
    assert 0 < expected.float().mean() < 1


@pytest.mark.parametrize("name", [name for name in RULES if name != "chosen"])
def test_places_are_counted_from_the_first_real_token_of_each_row(name):
    rule, _ = RULES[name]
    places = torch.arange(N)
    plain = every_pair(rule, places, places)
    moved = type(rule)(torch.tensor([[3, 1], [2, 0]]), *list(vars(rule).values())[1:])
    for b, (query, key) in enumerate(((3, 2), (1, 0))):
        assert every_pair(moved, places + query, places + key)[b].equal(plain[b])


def test_shifted_windows_are_those_of_the_cyclic_shift():
    """Swin's own way: roll the picture, cut it into windows, and hide what was not together before."""
    rows, columns, size, shift = 6, 8, 4, 2
    place = torch.arange(rows * columns).reshape(rows, columns)
    padded = torch.full((8, 8), -1)
    padded[:rows] = place
    # regions that the roll brings together, as in the official code: before the last window, in it, and wrapped
    region = torch.zeros(8, 8, dtype=torch.long)
    parts = slice(0, -size), slice(-size, -shift), slice(-shift, None)
    for number, (h, w) in enumerate(itertools.product(parts, parts)):
        region[h, w] = number
    rolled = padded.roll((-shift, -shift), (0, 1))
    seen = torch.zeros(rows * columns, rows * columns, dtype=torch.bool)
    for h, w in itertools.product(range(0, 8, size), range(0, 8, size)):
        inside, kinds = (
            rolled[h : h + size, w : w + size].flatten(),
            region[h : h + size, w : w + size].flatten(),
        )
        for i, a in zip(inside.tolist(), kinds.tolist(), strict=True):
            for j, b in zip(inside.tolist(), kinds.tolist(), strict=True):
                if a == b and i >= 0 and j >= 0:
                    seen[i, j] = True
    rule = Windows(ZERO, 0, (rows, columns), (size, size), (shift, shift))
    assert every_pair(rule, place.flatten(), place.flatten())[0, 0].equal(seen)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("as_edit", [True, False])
def test_attention_under_a_rule_is_the_dense_formula(name, as_edit):
    """As an edit of two heads and as the mask itself, tile by tile and pair by pair, behind a causal band."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 3, N, 4, generator=generator).double() for _ in range(3))
    rule, _ = RULES[name]
    some = torch.tensor([True, False, True])
    mask = Mask(N, N, right=0, extra=None if as_edit else rule)
    scoring = ScoreRule(0.7, mask, edits=(MaskScores(some, rule),) if as_edit else ())
    z, map = attend(q, k, v, scoring)
    dense = reference.attend(q, k, v, scoring)
    near(z, dense.z)
    near(map.dense(), dense.weights, 1e-6)
    found, expected = map.statistics(("entropy", "received", "visible")), reference.statistics(dense, scoring)
    for statistic, values in found.items():
        near(values, expected[statistic], 1e-4, statistic)
    columns = torch.randint(0, N, (2, 3, N, 3), generator=generator)
    near(map.at(columns), dense.weights.gather(-1, columns), 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dilated(ZERO, 2, 0), "step must be 1 or more; got 0"),
        (lambda: Windows(ZERO, 0, (4, 4), (2,), (0, 0)), "windows must be a number for each of"),
        (lambda: Near(ZERO, -1, (4,), (1,)), "first must be 0 or more"),
    ],
)
def test_a_rule_without_a_meaning_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_of_other_shapes_than_the_map_is_refused():
    q = torch.randn(2, 3, 5, 4)
    wrong = Listed(ZERO, SHOWN[:, :2])
    with pytest.raises(ValueError, match=r"MaskScores\.shown must be"):
        attend(q, q, q, ScoreRule(1.0, Mask(5, 5), edits=(MaskScores(torch.ones(3) > 0, wrong),)))
