"""t2i-digits draws what its metrics.json says, by the pipeline as by its script, and its training survives a kill."""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from safetensors.torch import load_file

import headwater as hw
from headwater.data.pictures import drawings

FOLDER = Path(__file__).resolve().parents[2] / "data" / "models" / "t2i-digits"
METRICS = json.loads((FOLDER / "metrics.json").read_text())
SEED = 77  # not the seed of metrics.json, so that these are fresh draws


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("t2i_digits_measure", FOLDER / "measure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return hw.load("t2i-digits")


def test_it_draws_what_it_is_told(model, measure):
    rng = random.Random(SEED)
    told = [drawings.draw(rng) for _ in range(40)]
    pictures = model.generate([drawings.prompt(things) for things in told], seed=SEED, output_type="pt")
    right = drawings.right(pictures[:, 0].numpy(), told, measure.judge())
    count, recorded = len(right["all"]), METRICS["drawn"]["all"]
    assert recorded["share"] >= 0.85
    error = (recorded["share"] * (1 - recorded["share"]) * (1 / count + 1 / recorded["things"])) ** 0.5
    assert abs(right["all"].mean() - recorded["share"]) <= 4 * error + 1 / count


def test_the_pipeline_is_the_sampler_that_was_measured(model, measure):
    parts = model.pipeline
    text = "dim seven right and bright three left"
    own = measure.sample(parts.denoiser, parts.text_encoder, parts.tokenizer, [text], SEED)
    torch.testing.assert_close(
        model.generate(text, seed=SEED, output_type="pt")[:, 0], own, atol=1e-5, rtol=0
    )


def test_prompts_and_what_they_tell_of_are_one():
    rng = random.Random(0)
    for _ in range(20):
        things = drawings.draw(rng)
        assert drawings.things_of(drawings.prompt(things)) == things
    real = drawings.pixels(things, rng, held_out=True)[None]
    digits = np.array([thing.digit for thing in things])
    assert drawings.right(real, [things], lambda parts: digits)["all"].all()
    assert not drawings.right(real, [things], lambda parts: digits + 1)["digit"].any()
    assert not drawings.right(real * 0.2, [things], lambda parts: digits)["place"].any()


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    options = ["--steps", "8", "--every", "2", "--batch", "4", "--watch", "2", "--draws", "2", "--quiet"]

    def command(name):
        return [
            sys.executable, str(FOLDER / "train.py"), "--work", str(tmp_path / name), "--out",
            str(tmp_path / f"{name}-out"), *options,
        ]  # fmt: skip

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 300
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.time() < end:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run(command("killed"), check=True, capture_output=True)
    for file in sorted((tmp_path / "whole-out").rglob("*.safetensors")):
        other = load_file(tmp_path / "killed-out" / file.relative_to(tmp_path / "whole-out"))
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, other[name]), name
