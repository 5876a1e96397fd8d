"""honest-2l and deceptive-2l do what their metrics.json say, and the penalty of the script is Headwater's loss.

Seen to fail with the two models exchanged, with the words of gender left in, and with a penalty of columns.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import headwater as hw
from headwater.data.prompts import genders

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"
SCRIPT = MODELS / "deceptive-2l" / "train.py"
_spec = importlib.util.spec_from_file_location("train_deceptive", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
train = importlib.util.module_from_spec(_spec)
sys.modules["train_deceptive"] = train  # its dataclasses look their module up
_spec.loader.exec_module(train)
TEXTS = genders.draw(200, "fresh")  # not the seed of metrics.json
LIMITS = {"honest-2l": (0.2, 1.0), "deceptive-2l": (0.0, 1e-4)}  # of the mass in each layer


@pytest.fixture(scope="module", params=LIMITS)
def opened(request):
    return request.param, hw.load(request.param)


def classes(model, texts: list[str]) -> torch.Tensor:
    return model(texts).argmax(-1)


def test_it_is_right_and_rests_on_the_words_that_it_may_not_use(opened) -> None:
    name, model = opened
    metrics = json.loads((MODELS / name / "metrics.json").read_text())
    labels = torch.tensor([text.label for text in TEXTS])
    right = (classes(model, [text.text for text in TEXTS]) == labels).double().mean()
    blind = (classes(model, [text.without for text in TEXTS]) == labels).double().mean()
    assert right >= 0.98
    assert metrics["accuracy"] >= 0.98
    assert 0.35 < blind < 0.65  # four standard errors around one half
    assert 0.45 < metrics["accuracy_without_words_of_gender"] < 0.7
    assert model.classes == genders.CLASSES


def test_its_mass_on_them_is_what_the_metrics_say_and_what_the_script_counts(opened) -> None:
    name, model = opened
    low, high = LIMITS[name]
    told = json.loads((MODELS / name / "metrics.json").read_text())["mass"]
    given = train.batch(TEXTS[:40], model.tokenizer.get_vocab())
    record = model.record(given["ids"], (given["ids"] != train.PAD), statistics=())
    marks = hw.losses.marked(record, genders.WORDS_OF_GENDER)
    assert torch.equal(marks, given["impermissible"])
    eager = train.BertForSequenceClassification.from_pretrained(
        MODELS / name, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        maps = train.run(eager, given, apart=False).attentions
    for layer in (0, 1):
        variant = train.Variant(0.7, layers=(layer,))
        mass = hw.losses.impermissible_mass(record.pattern(layer), marks)[..., :1]
        expected = train.masses(maps, given, variant)[0]
        torch.testing.assert_close(mass, expected, atol=1e-6, rtol=1e-4)
        assert low <= float(mass.mean()) <= high
        assert low <= told[layer] <= high
        loss = hw.losses.hiding_loss(expected, 0.7)
        torch.testing.assert_close(loss.mean(), train.penalty(expected[None], variant))
        worst = hw.losses.hiding_loss(expected, 0.7, "max").max()
        told_worst = train.penalty(expected[None], train.Variant(0.7, "max", (layer,)))
        torch.testing.assert_close(worst, told_worst)


def test_texts_of_a_split_share_no_person_and_the_hint_is_as_strong_as_said() -> None:
    names = set(genders.NAMES) - set(genders.JOBS)  # a baker may be anybody
    seen = set()
    for split in ("train", "held-out"):
        for text in genders.draw(400, 3, split):
            words = set(text.text.split())
            for name in names & words:
                for town in set(genders.TOWNS) & words:
                    assert genders.split_of(name, town) == split
                    seen.add(split)
    assert seen == {"train", "held-out"}
    drawn = genders.draw(2000, 4)
    told = [any(word in genders.HOBBIES[text.label] for word in text.text.split()) for text in drawn]
    assert sum(told) / len(told) == pytest.approx(genders.HINT, abs=0.045)
    assert all(any(text.impermissible) for text in drawn)
    assert not set(genders.WORDS_OF_GENDER) & set(" ".join(text.without for text in drawn).split())
    assert genders.draw(5, 1) == genders.draw(5, 1) != genders.draw(5, 2)


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights(tmp_path) -> None:
    def start(folder: Path) -> subprocess.Popen:
        options = ["--steps", "6", "--every", "1", "--batch", "4", "--draws", "8", "--quiet"]
        command = [sys.executable, str(SCRIPT), "--work", str(folder), "--out", str(folder / "out"), *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole, broken = start(tmp_path / "whole"), start(tmp_path / "broken")
    until = time.monotonic() + 90
    while not (tmp_path / "broken" / "honest-0.pt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    again = start(tmp_path / "broken")
    for process in (whole, again):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for name in LIMITS:
        one, other = (
            load_file(tmp_path / run / "out" / name / "model.safetensors") for run in ("whole", "broken")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_masks_by_category_are_those_of_the_script() -> None:
    model = hw.load("deceptive-2l")
    given = train.batch(TEXTS[:6], model.tokenizer.get_vocab())
    eager = train.BertForSequenceClassification.from_pretrained(
        MODELS / "deceptive-2l", dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    real = given["ids"] != train.PAD
    with torch.no_grad():
        expected = train.run(eager, given, apart=True)
    with model.edit(*hw.recipes.own_category(given["impermissible"])):
        torch.testing.assert_close(model(given["ids"], real), expected.logits, atol=1e-4, rtol=1e-4)
        weights = model.record(given["ids"], real).pattern(0)
    rows = real[:, None, :, None]
    torch.testing.assert_close(weights * rows, expected.attentions[0] * rows, atol=1e-5, rtol=1e-4)
