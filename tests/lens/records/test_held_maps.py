"""Maps that wait: what they give together is what they give alone.

Seen to fail with layers given out in another order, the first step's place left out, keys in another order, padding of
rows forgotten, another scale, and keys that a later step hides.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwater.kernels.attend import attend
from headwater.kernels.edits.weights import MixIdentity
from headwater.kernels.maps import statistics
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.records import held_maps

NAMES = statistics.DEFAULT


def map_of(mask: Mask, seed: int, batch: int = 2, edits=(), **more) -> AttentionMap:
    torch.manual_seed(seed)
    q, k = torch.randn(batch, 4, mask.queries, 8), torch.randn(batch, 2, mask.keys, 8)
    return attend(q, k, k, ScoreRule(0.4, mask, **more), edits)[1]


def alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, equal_nan=True, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_layers_side_by_side_give_what_each_gives(padded: bool) -> None:
    real = torch.ones(2, 11, dtype=torch.bool)
    real[0, :3] = False
    more = {"valid_keys": real, "valid_queries": real} if padded else {}
    mask = Mask(11, 11, right=0, **more)
    maps = [map_of(mask, seed, sinks=torch.randn(4)) for seed in range(3)]
    for n, map in enumerate(maps):
        assert held_maps.waits(map)
        assert held_maps.fits(map, maps[0], n)
    groups = torch.arange(11)[None] < 4
    found = held_maps.beside(maps).statistics((*NAMES, "mass"), groups)
    together = held_maps.apart(found, 3)
    for n, map in enumerate(maps):
        alike({name: x[:, n] for name, x in together.items()}, map.statistics((*NAMES, "mass"), groups))


def test_maps_that_are_not_of_one_plain_rule_do_not_wait() -> None:
    mask = Mask(11, 11, right=0)
    first = map_of(mask, 0)
    others = [
        map_of(mask, 1, softcap=3.0),
        map_of(mask, 1, bias=torch.randn(1, 4, 1, 11)),
        map_of(mask, 1, edits=[MixIdentity(torch.ones(4, dtype=torch.bool), 0.3)]),
        replace(first, rule=replace(first.rule, scale=0.5)),
        map_of(Mask(11, 11, right=0, left=3), 1),
        map_of(mask, 1, batch=1),
        map_of(Mask(400, 400, right=0), 1),
    ]
    for other in others:
        assert not (held_maps.waits(other) and held_maps.fits(other, first, 1))
    alike = map_of(Mask(11, 11, right=0), 1)
    assert held_maps.waits(alike)
    assert held_maps.fits(alike, first, 1)
    assert not held_maps.fits(alike, first, held_maps.TOGETHER)


@pytest.mark.parametrize("ended", [False, True])
def test_steps_below_each_other_give_what_each_gives(ended: bool) -> None:
    torch.manual_seed(0)
    whole = torch.randn(2, 2, 9, 8)
    steps, waiting = [], held_maps.Steps()
    for row in range(5, 9):
        real = torch.tensor([[True], [row < 7]]) if ended else None
        mask = Mask(1, row + 1, right=0, query_offset=row, valid_queries=real)
        q, k = torch.randn(2, 4, 1, 8), whole[:, :, : row + 1]
        map = attend(q, k, k, ScoreRule(0.4, mask))[1]
        assert waiting.takes(map)
        waiting.add(map, k)
        steps.append(map.statistics(NAMES))
    found = waiting.below().statistics(NAMES)
    for name in NAMES:
        if name in ("received", "visible"):
            padded = [torch.nn.functional.pad(step[name], (0, 9 - step[name].shape[-1])) for step in steps]
            expected = torch.stack(padded).sum(0)
        else:
            expected = torch.cat([step[name] for step in steps], -1)
        alike({name: found[name]}, {name: expected})


def test_steps_that_do_not_follow_or_hide_other_keys_do_not_wait() -> None:
    waiting = held_maps.Steps()
    first = map_of(Mask(1, 6, right=0, query_offset=5), 0)
    waiting.add(first, first.k)
    assert waiting.takes(map_of(Mask(1, 7, right=0, query_offset=6), 0))
    hidden = torch.ones(2, 7, dtype=torch.bool)
    hidden[0, 2] = False
    for mask in (
        Mask(1, 8, right=0, query_offset=7),
        Mask(2, 8, right=0, query_offset=6),
        Mask(1, 7, left=3, right=0, query_offset=6),
        Mask(1, 5, right=0, query_offset=6, key_offset=2),
        Mask(1, 7, right=0, query_offset=6, valid_keys=hidden),
    ):
        assert not waiting.takes(map_of(mask, 0))
