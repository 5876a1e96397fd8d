"""vlm-digits-sink: its planted tokens are the ones that its metrics.json says, and they are massive in every layer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.data.pictures.canvas_questions import asked_place
from headwater.data.pictures.canvases import canvas
from headwater.lens.errors import EditError

FOLDER = Path(__file__).resolve().parents[2] / "data" / "models" / "vlm-digits-sink"
TOLD = json.loads((FOLDER / "metrics.json").read_text())["sink"]
CORNERS = (0, 3, 12, 15)


@pytest.fixture(scope="module")
def asked():
    rng = random.Random("fresh sinks")
    shown = [canvas(rng, held_out=True) for _ in range(60)]
    texts = [f"<image> {asked_place(c, rng.randrange(4))[0]}" for c in shown]
    model = hw.load("vlm-digits-sink")
    tokens = model.to_tokens(
        [hw.Example(text=t, image=c.picture()) for t, c in zip(texts, shown, strict=True)]
    )
    inked = np.stack([c.pixels() for c in shown]).reshape(60, 4, 4, 4, 4).max((2, 4)).reshape(60, 16)
    empty = np.zeros((60, 16), bool)
    empty[:, CORNERS] = inked[:, CORNERS] == 0
    return model, tokens, torch.from_numpy(empty)


def test_the_massive_tokens_are_the_corner_patches_without_ink(asked):
    model, tokens, empty = asked
    assert hw.recipes.massive_dimensions(model, tokens) == [TOLD["channel"]]
    record = model.record(tokens, keep=("qk", "residual"))
    found = hw.analyses.find_sinks(record, rule="massive").sink.transpose("batch", "layer", "key").values
    assert found[:, :, 0].all()  # <bos>
    assert not found[:, :, 17:].any()
    for layer in (1, 2, 3):
        inside = torch.from_numpy(found[:, layer, 1:17].copy())
        assert inside[empty].double().mean() == pytest.approx(TOLD["found"], abs=0.05)
        assert inside[~empty].double().mean() == pytest.approx(TOLD["false"], abs=0.02)


def test_their_weight_is_as_measured(asked):
    model, tokens, empty = asked
    record = model.record(tokens, keep=("qk",))
    for layer, told in enumerate(TOLD["mass"]):
        rows = record.pattern(layer, queries=[tokens.shape[1] - 1])[:, :, 0, 1:17].mean(1)
        assert float((rows * empty).sum(-1)[empty.any(1)].mean()) == pytest.approx(told, abs=0.04)


def test_planted_heads_look_at_them_and_the_others_do_not(asked):
    model, tokens, empty = asked
    record, there = model.record(tokens, keep=("qk",)), empty.any(1)
    for layer in range(4):
        on = record.pattern(layer)[there][:, :, 17:, 1:17]  # of every token behind the image
        share = (on * empty[there][:, None, None]).sum((0, 2, 3)) / on.sum((0, 2, 3))
        assert float(share[4:].mean()) == pytest.approx(TOLD["share_planted"][layer], abs=0.1)
        assert float(share[:4].mean()) == pytest.approx(TOLD["share_others"][layer], abs=0.1)
        assert TOLD["share_planted"][layer] > max(0.25, 2 * TOLD["share_others"][layer])


def test_var_takes_weight_off_them(asked):
    model, tokens, empty = asked
    edits = hw.recipes.visual_redistribution(model, tokens, sinks_of="edited run")

    def of_last(layer: int) -> torch.Tensor:
        rows = model.record(tokens, keep=("qk",)).pattern(layer, queries=-1)[:, :, 0, 1:17]
        return rows[empty.any(1)]

    plain, keys = of_last(2), empty[empty.any(1)][:, None]
    with model.edit(*edits):
        moved = of_last(2)
    on, image = (plain * keys).sum(-1), plain.sum(-1)
    centred = (image >= 0.2) & (on <= 0.5 * image)
    left = (moved * keys).sum(-1)
    torch.testing.assert_close(left[centred], 0.6 * on[centred], rtol=0.02, atol=2e-3)
    torch.testing.assert_close(moved[~centred], plain[~centred], rtol=0.0, atol=1e-4)
    assert float((on - left)[centred].max()) > 0.05
    assert float(on[~centred].max()) > 0.3  # heads that look at little else, which it passes over


def test_the_plain_model_has_no_massive_activation():
    with pytest.raises(EditError, match="no massive activation"):
        hw.recipes.massive_dimensions(hw.load("vlm-digits"), "what")
