"""Heads removed from one part of a model, or from several: the smaller model gives what the gated one gives.

Position biases that layers share stay with their heads. Mutations seen to fail: tables with heads
in another order, each layer's bias taken from the layer below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import any_input
import pytest
import torch

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo
from headwater.lens.loading.removal import remove_heads

BOTH = ["0.1", "0.3", "1.1", "1.3"]


@pytest.mark.parametrize(
    ("name", "part"), [*any_input.PARTS, ("bart", "encoder"), ("bart", "decoder"), ("bart", "cross")]
)
def test_it_gives_what_gates_by_hand_give(name: str, part: str) -> None:
    case = any_input.case(name, part)
    for heads in (["0.2", "0.3", "1.0", "1.1"], BOTH):  # unlike and alike in all layers
        smaller = remove_heads(case.model, heads)
        gates = torch.ones(case.model.n_layers, case.model.n_heads, dtype=torch.float64)
        for head in heads:
            gates[int(head[0]), int(head[2])] = 0
        given = zoo.inputs(name, 3)
        given = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        with torch.no_grad(), case.gated(gates):
            expected = case.score(case.plain(**given))
            torch.testing.assert_close(case.score(smaller(**given)), expected, rtol=1e-4, atol=1e-6)
        layer = hw.load(smaller).part(part).attention_module(0)
        assert sum(p.numel() for p in layer.parameters()) < sum(
            p.numel() for p in case.model.attention_module(0).parameters()
        )


@pytest.mark.parametrize(
    ("name", "heads"),
    [("vit_classifier", {"vision": BOTH}), ("llava", {"text": ["0.0", "0.1", "1.0", "1.1"]}),
     ("t5", {"encoder": BOTH, "decoder": ["0.0", "0.1", "1.0", "1.1"], "cross": BOTH})],
)  # fmt: skip
def test_the_folder_opens_again(tmp_path: Path, name: str, heads: Mapping[str, list[str]]) -> None:
    model = hw.load(zoo.build(name))
    remove_heads(model, heads).save_pretrained(tmp_path)
    again = hw.load(tmp_path)
    with contextlib.ExitStack() as stack:
        for part, gone in heads.items():
            stack.enter_context(model.part(part).edit(hw.ScaleHeads(dict.fromkeys(gone, 0.0))))
            assert again.part(part).n_heads == 2
        torch.testing.assert_close(again(**zoo.inputs(name)), model(**zoo.inputs(name)), rtol=1e-4, atol=1e-4)


def test_what_no_configuration_says(tmp_path: Path) -> None:
    t5, clip = (hw.load(zoo.build(name)) for name in ("t5", "clip"))
    for model, part in ((t5, "cross"), (clip, "vision")):
        with pytest.raises(ModelError, match="can not be saved as a folder that opens again"):
            remove_heads(model.part(part), BOTH).save_pretrained(tmp_path / "folder")
    assert not [*tmp_path.iterdir()]
