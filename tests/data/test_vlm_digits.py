"""vlm-digits and vlm-digits-sink answer as their metrics.json say, and their training survives a kill."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import headwater as hw
from headwater.data.pictures import canvas_questions
from headwater.data.pictures.canvases import canvas

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"


def script(name: str):
    """A script of the folder, which is no part of the package; other folders have a `measure` too."""
    spec = importlib.util.spec_from_file_location(f"vlm_digits_{name}", MODELS / "vlm-digits" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.pop("measure", None)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("measure", None)
        if before is not None:
            sys.modules["measure"] = before
    return module


NAMES = ["vlm-digits", "vlm-digits-sink"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", ["place", "presence"])
def test_questions_are_answered_as_measured(name, held_out, kind):
    model, rng = hw.load(name), random.Random("fresh")
    figures = json.loads((MODELS / name / "metrics.json").read_text())
    told = figures["held_out_digits" if held_out else "seen_digits"][kind]
    shown = [canvas(rng, held_out=held_out) for _ in range(100)]
    asked = [canvas_questions.question(kind, c, rng) for c in shown]
    examples = [
        hw.Example(text=f"<image> {text}", image=c.picture())
        for c, (text, _) in zip(shown, asked, strict=True)
    ]
    said = model.to_strings(model(examples)[:, -1].argmax(-1).tolist())
    right = sum(word.strip() == answer for word, (_, answer) in zip(said, asked, strict=True)) / len(asked)
    assert told["low"] <= told["accuracy"] <= told["high"]
    error = (told["accuracy"] * (1 - told["accuracy"]) / len(asked)) ** 0.5
    assert right > told["accuracy"] - max(0.04, 2.5 * error)
    assert f"{100 * told['accuracy']:.1f} %" in (MODELS / name / "README.md").read_text()


def test_captions_are_several_words():
    model, rng = hw.load("vlm-digits"), random.Random("caption")
    measure = script("measure")
    shown = [canvas(rng, count=2) for _ in range(20)]
    said = measure.answers(model.hf, model.processor, [(c, "what is there ?") for c in shown], 16)
    wanted = [canvas_questions.question("caption", c, rng)[1] for c in shown]
    assert all(len(text.split()) == 7 for text in wanted)
    assert sum(a == b for a, b in zip(said, wanted, strict=True)) >= 16


def test_half_of_the_questions_of_presence_have_yes_for_an_answer():
    rng = random.Random(0)
    said = [canvas_questions.question("presence", canvas(rng), rng)[1] for _ in range(400)]
    assert 160 < said.count("yes") < 240
    for _ in range(50):
        shown = canvas(rng)
        text, answer = canvas_questions.question("presence", shown, rng)
        word = text.split()[3]
        assert (answer == "yes") == (word in shown.caption())


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was(tmp_path, monkeypatch):
    train = script("train")

    def run(name: str) -> dict[str, torch.Tensor]:
        settings = {
            "seed": 3,
            "tower": 2,
            "steps": 3,
            "planted": 1,
            "drawn": 1,
            "presence": 2,
            "rate": 2e-3,
            "batch": 4,
            "every": 3,
            "watch": 4,
            "draws": 4,
        }
        out = tmp_path / name
        train.train(
            argparse.Namespace(out=out, work=tmp_path / f"{name}-work", sink=True, quiet=True, **settings)
        )
        return load_file(out / "model.safetensors")

    threads = torch.get_num_threads()
    whole, save = run("whole"), train.os.replace

    def killed(part, path):
        save(part, path)
        if Path(path).name == "checkpoint.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    again = run("killed")
    torch.set_num_threads(threads)
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, msg=name)
