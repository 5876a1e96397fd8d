"""Pictures, sounds, decoder texts and labels on the command line, and what is given once or for each prompt.

The numbers are held to transformers' own processors and eager attention. Seen to fail: two pictures swapped, the
decoder's text dropped, the part left at the main one, a label ignored, prompts shared by several pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sense_folders
import torch
from PIL import Image
from scipy.io import wavfile
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import headwater as hw
from headwater.command.beside import Beside, examples
from headwater.command.inputs import frames_of
from headwater.lens.errors import PromptError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG, a JPEG, two WAVs and folders of tiny models."""
    folder = tmp_path_factory.mktemp("senses")
    sense_folders.photograph(0).save(folder / "a.png")
    sense_folders.photograph(1).save(folder / "b.jpg")
    sense_folders.tone(folder / "a.wav")
    for name in ("vit_classifier", "llava", "whisper", "t5"):
        sense_folders.save(name, folder / name)
    return folder


def entropy(maps: tuple[torch.Tensor, ...]) -> np.ndarray:
    """[example, layer, head, query], from eager maps."""
    stacked = torch.stack(maps, 1).detach().double()
    return -(stacked * stacked.log()).sum(-1).numpy()


def data(run: Any, name: str) -> np.ndarray:
    assert run.exit_code == 0, run.stderr
    return np.array(json.loads(run.stdout)["data_vars"][name]["data"], dtype=float)


def test_pictures_are_what_transformers_makes_of_them(headwater, place) -> None:
    folder, files = place / "vit_classifier", [place / "a.png", place / "b.jpg"]
    images = [Image.open(file).convert("RGB") for file in files]
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")
    plain = AutoModelForImageClassification.from_pretrained(folder, attn_implementation="eager")
    expected = entropy(plain(**pixels, output_attentions=True).attentions)
    given = [word for file in files for word in ("--image", file)]
    found = headwater("record", *given, "-m", folder, "-s", "entropy", "--json")
    np.testing.assert_allclose(data(found, "entropy"), expected, atol=1e-5)
    keys = json.loads(headwater("analyze", "rollout", *given[:2], "-m", folder, "--json").stdout)["coords"][
        "key_token"
    ]
    assert keys["data"][0] == ["[CLS]", *(f"{row},{column}" for row in range(3) for column in range(3))]


def test_a_sound_is_what_transformers_makes_of_it(headwater, place) -> None:
    folder = place / "whisper"
    rate, samples = wavfile.read(place / "a.wav")
    made = WhisperFeatureExtractor.from_pretrained(folder)(
        samples / 2**15, sampling_rate=rate, return_tensors="pt"
    )
    plain = WhisperForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([[2, 3, 4]])  # the start, and "the cat"
    out = plain(**made, decoder_input_ids=ids, output_attentions=True)
    given = ("--audio", place / "a.wav", "--decoder", "the cat", "-m", folder, "-s", "entropy", "--json")
    for part, maps in (("cross", out.cross_attentions), ("encoder", out.encoder_attentions)):
        found = headwater("record", *given, "--part", part)
        np.testing.assert_allclose(data(found, "entropy"), entropy(maps), atol=1e-5)
    by_prompt = headwater("record", "the cat", *given[:2], *given[4:], "--part", "cross")
    np.testing.assert_allclose(data(by_prompt, "entropy"), entropy(out.cross_attentions), atol=1e-5)


def test_analyses_take_them_with_labels_and_parts(headwater, place, tmp_path: Path) -> None:
    vit, file = hw.load(place / "vit_classifier"), place / "a.png"
    expected = hw.analyses.head_importance(vit, [hw.Example(image=file, label=2)])
    run = headwater(
        "analyze",
        "head_importance",
        "--image",
        file,
        "--label",
        "2",
        "-m",
        place / "vit_classifier",
        "--json",
    )
    assert run.exit_code == 0, run.stderr
    np.testing.assert_allclose(json.loads(run.stdout)["data"], expected.values, rtol=1e-6)
    t5 = ("the cat", "--decoder", "a mat", "-m", place / "t5")
    saved = tmp_path / "run.safetensors"
    assert headwater("record", *t5, "-o", saved).exit_code == 0
    for part in ("cross", "encoder"):
        now = headwater("analyze", "raw_attention", *t5, "--part", part, "--json")
        then = headwater("analyze", "raw_attention", "--record", saved, "--part", part, "--json")
        assert now.exit_code == 0, now.stderr
        assert json.loads(now.stdout)["data"] == json.loads(then.stdout)["data"]
        assert json.loads(now.stdout)["coords"]["key_token"]["data"] == [["the", "cat"]]


def test_pairs_of_pictures_take_turns(headwater, place) -> None:
    folder, files = place / "vit_classifier", [place / "a.png", place / "b.jpg"]
    clean, corrupt = ([hw.Example(image=file)] for file in files)
    expected = hw.analyses.patch(hw.load(folder), clean, corrupt, answer="1", wrong="0")
    given = [word for file in files for word in ("--image", file)]
    run = headwater(
        "analyze", "patch", *given, "--set", "answer=1", "--set", "wrong=0", "-m", folder, "--json"
    )
    assert run.exit_code == 0, run.stderr
    np.testing.assert_allclose(json.loads(run.stdout)["data"], expected.values, rtol=1e-5, atol=1e-6)


def made(texts: list[str], beside: Beside) -> list[hw.Example]:
    return [each for each in examples(texts, beside) if isinstance(each, hw.Example)]


def test_one_picture_serves_all_prompts_and_several_pair_up(place) -> None:
    files = [place / "a.png", place / "b.jpg"]
    shared = made(["<image> the", "<image> cat"], Beside(files[:1], (), (), ("1", "2")))
    assert [(each.text, np.shape(each.image)[:2], each.label) for each in shared] == [
        ("<image> the", (20, 30), "1"), ("<image> cat", (20, 30), "2")
    ]  # fmt: skip
    paired = made(["<image> the", "<image> cat"], Beside(files))
    assert [np.asarray(each.image)[0, 0].tolist() for each in paired] == [
        np.asarray(Image.open(file))[0, 0].tolist() for file in files
    ]
    assert [each.audio for each in made([], Beside((), files, ("the",)))] == files
    assert examples(["the", "cat"], Beside()) == ["the", "cat"]


@pytest.mark.parametrize(
    ("texts", "beside", "words"),
    [
        (["the"], Beside([Path("a"), Path("b")]), "--image is given 2 times with 1 prompt;"),
        (["a", "b", "c"], Beside([Path("a"), Path("b")]), "--image is given 2 times with 3 prompts"),
        ([], Beside([Path("a")], (), ("x", "y")), "--decoder is given 2 times with 1 --image"),
        ([], Beside([Path("a")], [Path("b")] * 2), "--audio is given 2 times"),
        ([], Beside([Path("a")] * 300), "more than 256"),
    ],
)
def test_what_does_not_pair_up_is_refused(texts, beside, words) -> None:
    with pytest.raises(PromptError, match=words):
        examples(texts, beside)


def test_what_reads_no_examples_refuses_them(headwater, place) -> None:
    picture, model = ("--image", place / "a.png"), ("-m", place / "vit_classifier")
    for given, words in (
        (("analyze", "rollout", "--record", "x.safetensors", *picture), "takes the place of prompts, pictures"),
        (("analyze", "head_roles", *picture, *model), "reads the model alone"),
        (("analyze", "circuit_overlap", "a.json", "b.json", *picture), "two circuit files, no model"),
        (("analyze", "circuit_overlap", "a.json", "b.json", "--part", "cross"), "two circuit files, no model"),
        (("record", *picture, "-m", "tasks-4l"), "reads no pictures"),
        (("record", "the", *picture, *model), "reads no text"),
        (("record", *picture, "--part", "cros", *model), "no part 'cros'"),
        (("analyze", "head_importance", *picture, *model), "give label="),
        (("analyze", "head_importance", *picture, "--label", "cat", *model), "is no class"),
    ):  # fmt: skip
        run = headwater(*given)
        assert (run.exit_code, run.stdout, len(run.stderr.splitlines())) == (2, "", 1), run.stderr
        assert words in run.stderr


def test_pictures_of_a_model_of_films_are_frames(tmp_path: Path) -> None:
    files = []
    for n in range(8):
        files.append(tmp_path / f"{n}.png")
        Image.fromarray(np.full((16, 16), 30 * n, np.uint8)).save(files[-1])
    films = examples([], Beside(images=files), 4)
    assert [[int(np.asarray(frame)[0, 0, 0]) for frame in film.images] for film in films] == [
        [0, 30, 60, 90], [120, 150, 180, 210],
    ]  # fmt: skip
    with pytest.raises(PromptError, match="a film has 4 frames"):
        examples([], Beside(images=files[:6]), 4)
    assert frames_of(hw.load("video-digits")) == 4
    assert frames_of(hw.load("vit-digits")) == 1
