"""Value zeroing against a float64 model whose value projections are overwritten, one token and one layer at a time.

Mutations seen to fail: values of the wrong key group, an identity mixed in, rows not normalised, edits of heads applied
before the values are taken off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from limits import lower
from mixing_oracle import blocks_of
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.value_zeroing import value_zeroing
from headwater.lens.errors import AnalysisError


def projection(block):
    """The module that gives the values, and which of its outputs they are."""
    if hasattr(block, "attn"):
        return block.attn.c_attn, slice(-32, None)
    own = block.attention.self.value if hasattr(block, "intermediate") else block.self_attn.v_proj
    return own, slice(None)


@torch.no_grad()
def dense(twin, ids: Tensor) -> list[Tensor]:
    """V of each layer: the model runs whole, with one layer's values zeroed at one token, and its block is read."""
    maps = []
    for block in blocks_of(twin):
        module, part = projection(block)
        clean = _output(twin, block, ids)
        found = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        for token in range(len(ids)):

            def zero(module, args, output, token=token, part=part):
                output = output.clone()
                output[:, token, part] = 0
                return output

            handle = module.register_forward_hook(zero)
            changed = _output(twin, block, ids)
            handle.remove()
            found[:, token] = 1 - torch.cosine_similarity(clean, changed, dim=-1)
        found[found < 1e-13] = 0
        empty = found.sum(-1) == 0
        found[empty] = torch.eye(len(ids), dtype=torch.float64)[empty]
        maps.append(found / found.sum(-1, keepdim=True))
    return maps


def _output(twin, block, ids: Tensor) -> Tensor:
    kept = []
    handle = block.register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    twin(ids[None])
    handle.remove()
    return kept[0][0]


def product(maps: list[Tensor]) -> Tensor:
    found = torch.eye(len(maps[0]), dtype=torch.float64)
    for layer in maps:
        found = layer @ found
    return found


def test_matches_zeroed_projections(pair, batch) -> None:
    ids, mask = batch[0][1:], batch[1][1:]
    found = value_zeroing(pair.model, pair.model.to_tokens(ids, mask), queries=[-1, 1])
    for row, real in enumerate(mask.bool()):
        expected = product(dense(pair.twin, ids[row][real]))
        np.testing.assert_allclose(found.values[row][:, real.numpy()], expected[[-1, 1]], atol=2e-3)
        np.testing.assert_allclose(np.nansum(found.values[row], -1), 1, atol=1e-9)


def test_one_layer_in_small_groups(pairs: Callable, monkeypatch) -> None:
    pair = pairs("llama")
    ids = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(2))
    lower(monkeypatch, "analyses.tokens.value_zeroing", ELEMENTS=4 * 7 * 8 * 2)
    found = value_zeroing(pair.model, ids, queries="all", first_layer=1, last_layer=1)
    np.testing.assert_allclose(found.values[0], dense(pair.twin, ids[0])[1], atol=1e-3)


def test_under_an_edit_of_a_head(pairs: Callable) -> None:
    pair = pairs("gpt2")
    ids = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(2))
    twin = copy.deepcopy(pair.twin)
    with torch.no_grad():
        twin.transformer.h[1].attn.c_proj.weight[8:16] *= 3.0
    expected = product(dense(replace(pair, twin=twin).twin, ids[0]))
    with pair.model.edit(hw.ScaleHeads({"1.1": 3.0})):
        found = value_zeroing(pair.model, ids, queries="all")
    np.testing.assert_allclose(found.values[0], expected, atol=2e-3)


def test_closed_forms_and_refusals(pairs: Callable, uniform: hw.HookedModel, monkeypatch) -> None:
    ids = torch.arange(3, 9)[None]
    np.testing.assert_allclose(value_zeroing(uniform, ids, queries="all").values[0], np.eye(6))  # W_O is zero
    model = pairs("bert").model
    np.testing.assert_allclose(value_zeroing(model, torch.tensor([[5]])).values, [[[1.0]]])
    with pytest.raises(AnalysisError, match="last_layer=3 has no attention"):
        value_zeroing(model, ids, last_layer=3)
    with pytest.raises(AnalysisError, match="first_layer=2 is above last_layer=1"):
        value_zeroing(model, ids, first_layer=2, last_layer=1)
    lower(monkeypatch, "analyses.tokens.value_zeroing", LONGEST=5)
    with pytest.raises(AnalysisError, match="takes 5 at most"):
        value_zeroing(model, ids)
