"""llava-small: what is counted of it, how its training weighs answers, and, with its parts added, what it answers."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch

import headwater as hw
from headwater.data.pictures import scenes

FOLDER = Path(__file__).resolve().parents[2] / "data" / "models" / "llava-small"
METRICS = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))


def script(name: str):
    """A script of the folder, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"llava_small_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scenes_that_disagree_lack_the_partner_and_others_have_it_in_four_of_five():
    rng = random.Random(5)
    drawn = [scenes.scene(rng) for _ in range(3000)]
    for first, second in scenes.PAIRS.items():
        having = [second in each.present for each in drawn if first in each.present]
        assert abs(sum(having) / len(having) - scenes.PRIOR) < 0.04
    measure = script("measure")
    assert not any({*measure.partners(each)} & each.present for each in drawn)
    for _ in range(30):
        shown = scenes.conflicting(rng)
        (partner, *_) = measure.partners(shown)
        assert partner not in shown.present
        assert any(scenes.PAIRS.get(each) == partner for each in shown.present)


def test_what_is_counted_is_what_chair_and_pope_count():
    measure = script("measure")
    a, b, c = ("red", "circle"), ("blue", "square"), ("green", "cross")
    shown = [scenes.Scene((a, None, b, None), 0), scenes.Scene((c, a, None, None), 1)]
    found = measure.captions(["A red circle, a blue square.", "A red circle, a blue square."], shown)
    of = hw.analyses.chair([[a, b], [a, b]], [each.present for each in shown]).value
    assert found["chair_s"]["share"] == float(of.sel(measure="chair_s")) == 0.5
    assert found["chair_i"]["share"] == float(of.sel(measure="chair_i")) == 0.25
    assert found["left_out"]["share"] == 1 - float(of.sel(measure="recall"))
    there, absent = ["Yes.", "No.", "Yes."], ["Yes.", "No.", "No."]
    found = measure.pope(there, absent)
    of = hw.analyses.pope(there + absent, [True] * 3 + [False] * 3).value
    for name in ("f1", "yes_rate"):
        assert found[name] == pytest.approx(float(of.sel(measure=name)), abs=1e-4)
    assert found["accuracy"]["share"] == pytest.approx(float(of.sel(measure="accuracy")), abs=1e-4)


def test_each_answer_counts_alike():
    train = script("train")
    target = torch.tensor([[-100, 5, 6, 7, -100, 8, -100], [-100, 9, -100, 4, 4, -100, -100]])
    block = torch.tensor([[0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2, -1]])
    found = train.weights({"target": target, "block": block})
    wanted = torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3, 0, 1, 0], [0, 1, 0, 1 / 2, 1 / 2, 0, 0]]) / 4
    torch.testing.assert_close(found, wanted)


def test_the_page_of_the_model_has_its_figures():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("place", "colour", "caption"):
        assert f"{100 * METRICS[name]['share']:.1f} %" in page
    for name in ("random", "popular", "near", "adversarial"):
        assert f"{100 * METRICS[f'pope, {name}']['accuracy']['share']:.1f} %" in page


def test_captions_are_as_measured(llava_small):
    rng = random.Random("fresh")
    shown = [scenes.scene(rng, held_out=True) for _ in range(12)]
    measure = script("measure")
    text = scenes.CHAT.format(measure.CAPTION)
    given = [hw.Example(text=text, image=each.picture()) for each in shown]
    said = [each.rpartition("assistant\n")[2] for each in llava_small.generate(given, 24)]
    missed = measure.captions(said, shown)["left_out"]["share"]
    assert (
        missed < METRICS["captions, ordinary"]["left_out"]["high"] + 0.2
    )  # two standard errors of some 30 things
