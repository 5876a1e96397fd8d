"""vit-digits reads what its metrics.json says, takes pictures as they are, and its training survives a kill."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import headwater as hw
from headwater.data.pictures.digits import WORDS, digits

FOLDER = Path(__file__).resolve().parents[2] / "data" / "models" / "vit-digits"
METRICS = json.loads((FOLDER / "metrics.json").read_text())
_spec = importlib.util.spec_from_file_location("train_vit_digits", FOLDER / "train.py")
assert _spec is not None
assert _spec.loader is not None
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)


@pytest.fixture(scope="module")
def model():
    return hw.load("vit-digits")


def test_the_held_out_digits_are_read_as_measured(model):
    pictures, labels = (torch.from_numpy(x) for x in digits(held_out=True))
    right = model(train.pixels(pictures[:, None])).argmax(-1) == labels
    told = METRICS["held_out"]
    assert told["examples"] == len(labels) == 360
    assert float(right.double().mean()) == pytest.approx(told["accuracy"], abs=1.5 / 360)
    assert told["accuracy"] >= 0.97
    low, high = told["interval_95"]
    assert low < told["accuracy"] < high
    assert model.classes == WORDS
    assert f"{100 * told['accuracy']:.1f} % of 360" in (FOLDER / "README.md").read_text()


def test_turned_and_moved_digits_are_read_too(model):
    """Fresh draws: no varied digit of these was trained on or measured."""
    pictures, labels = (torch.from_numpy(x) for x in digits(held_out=True))
    moved = train.varied(pictures[:, None], torch.Generator().manual_seed(77))
    right = model(train.pixels(moved)).argmax(-1) == labels
    assert right.double().mean() > 0.9


def test_pictures_go_in_as_they_are(model):
    pictures, labels = digits(held_out=True)
    grey = [Image.fromarray((255 * each).round().astype(np.uint8)) for each in pictures[:8]]
    found = model(grey)
    assert found.argmax(-1).tolist() == labels[:8].tolist()
    plain = model(train.pixels(torch.from_numpy(pictures[:8])[:, None]))
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0.01)
    torch.testing.assert_close(model([each.convert("RGB") for each in grey]), found)
    torch.testing.assert_close(model(np.array(grey[0])), found[:1])


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was(tmp_path, monkeypatch):
    def run(name: str) -> dict[str, torch.Tensor]:
        settings = {"seed": 3, "steps": 7, "rate": 2e-3, "batch": 8, "every": 3, "quiet": True}
        train.train(argparse.Namespace(out=tmp_path / name, work=tmp_path / f"{name}-work", **settings))
        return load_file(tmp_path / name / "model.safetensors")

    threads = torch.get_num_threads()
    whole, save = run("whole"), train.save_checkpoint

    def killed(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    monkeypatch.setattr(train, "save_checkpoint", save)
    broken = run("broken")
    torch.set_num_threads(threads)
    assert whole.keys() == broken.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(broken[name], expected, atol=0, rtol=0, msg=name)
