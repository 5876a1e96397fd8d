"""Signals between heads of towers of pictures, encoders and decoders.

The oracle is the plain transformers model met by hooks. Mutation seen to fail: the change of the
signal at another position.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patched_by_hand import ByHand

import headwater as hw
from headwater.analyses._streams.score_slices import Forms
from headwater.analyses.circuits.signal_interventions import _Pair
from headwater.lens.models.projections import projections

D = 8


@pytest.mark.parametrize(
    ("name", "part"),
    [("vit_classifier", "vision"), ("clip", "vision"), ("t5", "encoder"), ("whisper", "decoder")],
)
def test_scores_are_forms_of_the_stream(name: str, part: str) -> None:
    hand = ByHand(name, part)
    row = hand.pair()[0].rows([0])
    forms = Forms(hand.model, [row])
    prompt = forms.run(row)
    path = {module: path for path, module in hand.model.hf.named_modules()}
    seen: list[torch.Tensor] = []
    found = projections(hand.model, 1)
    for each in (found.query, found.key):
        module = hand.plain.get_submodule(path[each.module])
        module.register_forward_hook(lambda _, args, out: seen.append(out[:1].detach().double()))
    hand.run(0, {})
    q, k = (x.unflatten(-1, (4, D)).transpose(1, 2)[0] for x in seen)
    np.testing.assert_allclose(forms.layers[1].scores(prompt.x[1]), q @ k.mT, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "part"), [("vit_classifier", "vision"), ("clip", "vision"), ("t5", "decoder"), ("llava", "text")]
)
def test_a_signal_taken_out_by_hand(name: str, part: str) -> None:
    hand = ByHand(name, part)
    row = hand.pair()[0].rows([0])
    place = hand.seen(0)["block", 0].shape[1] - 1
    found = hw.analyses.signal_interventions(
        hand.model, row, reader="1.2", sender="0.1", side="q", draws=1, **hand.settings()
    )
    forms = Forms(hand.model, [row])
    pair = _Pair.of(forms, forms.run(row), ("1.2", "0.1"), "q", 0, place, None, 1.0, False)
    signal = -pair.signals(1, torch.Generator())[0].float()

    def add(_: object, args: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, place] += signal
        return out

    before = hand.run(0, {})
    handle = hand.modules["heads", 0].register_forward_hook(add)
    after = hand.run(0, {})
    handle.remove()
    np.testing.assert_allclose(found.change[0], (after - before)[0], rtol=2e-3, atol=1e-5)
    assert abs(float(found.change[0])) > 1e-6


def test_a_trace_of_a_picture() -> None:
    hand = ByHand("vit_classifier", "vision")
    graph = hw.analyses.trace_signals(hand.model, hand.pair()[0], position=0, firing=0.1, upstream="all")
    assert graph.graph["prompts"] == 2
    assert any(kind == "head" for _, kind in graph.nodes(data="kind"))
