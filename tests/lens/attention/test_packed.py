"""Rows of packed patches: one map of documents for each layer, held to the eager weights of every chunk.

Seen to fail: without the hook (the last chunk alone is recorded), with the hook taken off by putting the model back,
with the chunks of the layer before.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_towers import TOWERS, inputs, made
from torch import Tensor

import headwater as hw


def eager_chunks(model: Any, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The weights of each chunk, by layer of the tower."""
    import sys

    code: Any = sys.modules[type(model).__module__]
    plain, found = code.eager_attention_forward, {block.attn: [] for block in model.model.visual.blocks}

    def kept(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(module, *args, **kwargs)
        if module in found:
            found[module].append(output[1][0])
        return output

    monkeypatch.setattr(code, "eager_attention_forward", kept)
    with torch.no_grad():
        model(**given)
    return list(found.values())


@pytest.mark.parametrize("name", TOWERS)
def test_a_layer_has_one_map_of_all_chunks(name, monkeypatch, tmp_path):
    dense, given = made(name), inputs()
    model = hw.load(copy.deepcopy(dense))
    assert set(model.parts) == {"text", "vision"}
    assert model.unread == ()
    chunks = eager_chunks(dense, given, monkeypatch)
    assert [len(of) for of in chunks] == ([2, 2] if name.startswith("Qwen2V") else [3, 2])
    record = model.part("vision").record(**given)
    for layer, of_layer in enumerate(chunks):
        expected = torch.stack([torch.block_diag(*heads) for heads in zip(*of_layer, strict=True)])
        torch.testing.assert_close(record.pattern(layer)[0], expected, atol=2e-6, rtol=1e-4)
    opened = hw.Record.open(record.save(tmp_path / "tower.safetensors"), verify=True)
    assert opened.pattern(0).equal(record.pattern(0))


def test_outputs_are_those_of_eager_attention_and_an_edit_of_the_tower_moves_them():
    dense, given = made("Qwen2VLForConditionalGeneration"), inputs()
    model = hw.load(copy.deepcopy(dense))
    with torch.no_grad():
        expected = dense(**given).logits
    torch.testing.assert_close(model(**given), expected, atol=1e-5, rtol=1e-4)
    with model.part("vision").edit(hw.ScaleHeads({"0.1": 0.0})):
        moved = (model(**given) - expected).abs().amax((1, 2))
    assert (moved > 1e-5).all()
