"""The shipped task model does what its metrics.json says, and its training survives a kill."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "models" / "tasks-4l"
sys.path[:0] = [str(FOLDER), str(ROOT)]
import measure  # noqa: E402

from headwater.data.prompts import tasks  # noqa: E402

SEED = 77  # not the seed of metrics.json, so that these are fresh draws
DRAWS = 300
METRICS = json.loads((FOLDER / "metrics.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, use_safetensors=True, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def within_sampling_error(share: float, draws: int, recorded: float, recorded_draws: int) -> bool:
    """Four standard errors of the difference of two shares, plus one draw for shares at the very end."""
    middle = (share * draws + recorded * recorded_draws) / (draws + recorded_draws)
    error = (middle * (1 - middle) * (1 / draws + 1 / recorded_draws)) ** 0.5
    return abs(share - recorded) <= 4 * error + 1 / draws


@pytest.mark.parametrize(
    ("task", "required"), [("indirect_object", 0.99), ("capital", 0.99), ("colored_object", 0.95)]
)
def test_answers_are_the_arg_max(model, tokenizer, task, required):
    figures = measure.accuracy(model, tokenizer, tasks.draw(task, DRAWS, SEED))
    recorded = METRICS["tasks"][task]
    assert figures["accuracy"] >= required
    assert recorded["accuracy"] >= required
    assert within_sampling_error(figures["accuracy"], DRAWS, recorded["accuracy"], recorded["draws"])
    assert figures["logit_difference"] == pytest.approx(recorded["logit_difference"], rel=0.15)


def test_a_corrupt_prompt_turns_the_answer(model, tokenizer):
    for task in ("indirect_object", "capital", "colored_object"):
        pairs = tasks.draw(task, 60, SEED)
        assert all(len(tokenizer.tokenize(e.prompt)) == len(tokenizer.tokenize(e.corrupt)) for e in pairs)
        turned = 0
        for e in pairs:
            row = torch.tensor([tokenizer(e.corrupt)["input_ids"]])
            turned += tokenizer.decode(model(row).logits[0, -1].argmax()) == e.corrupt_answer
        assert turned >= 54, task


@pytest.mark.parametrize("length", [10, 25, 50])
def test_second_copies_are_foretold(model, tokenizer, length):
    share = measure.induction(model, tokenizer, 30, length, SEED)
    recorded = METRICS["induction_accuracy"][str(length)]
    assert share >= 0.95
    assert recorded >= 0.95
    # Words of one text are no independent draws, so the allowance is wider than their number would give.
    assert share == pytest.approx(recorded, abs=0.03)


def test_a_head_matches_prefixes(model, tokenizer):
    """Counted here word by word, apart from the indexing in measure.py."""
    rows = measure.repeated_rows(tokenizer, 8, 20, SEED)
    patterns = measure.attention(model, rows)
    scores = torch.zeros(patterns.shape[0], patterns.shape[2])
    for n, row in enumerate(rows.tolist()):
        for i in range(21, 41):
            for j in range(1, i):
                if row[j - 1] == row[i]:
                    scores += patterns[:, n, :, i, j] / (20 * len(rows))
    torch.testing.assert_close(scores, measure.prefix_matching(model, tokenizer, 8, 20, SEED))
    best = METRICS["prefix_matching"]
    assert scores.max() >= 0.5
    assert scores[best["layer"], best["head"]].item() == pytest.approx(best["score"], abs=0.08)


def test_a_head_rests_on_the_first_token(model, tokenizer):
    shares = {}
    for task, recorded in METRICS["first_token_share"].items():
        prompts = [e.prompt for e in tasks.draw(task, 30, SEED)]
        scores = measure.first_token_share(model, tokenizer, prompts)
        # The head was chosen on the task's prompts for metrics.json and is measured on other ones here.
        shares[task] = scores[recorded["layer"], recorded["head"]].item()
        assert shares[task] == pytest.approx(recorded["score"], abs=0.06)
    assert shares["indirect_object"] > 0.3
    assert shares["capital"] > 0.3


def test_the_named_prompt_and_its_spelling(model, tokenizer):
    text = "When Mary and John went to the store , John gave a drink to"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids == tokenizer(text.replace(" ,", ","))["input_ids"]
    assert tokenizer.decode(model(torch.tensor([ids])).logits[0, -1].argmax()) == "Mary"


def test_every_word_is_one_known_token(tokenizer):
    for task in tasks.TASKS:
        for e in tasks.draw(task, 100, SEED):
            for text in (e.prompt, e.answer, *e.wrong, e.corrupt):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert len(ids) == len(text.split()) + 1


def test_weights_are_small_half_precision_and_no_pickle():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 8_000_000
    with safe_open(weights, "pt") as tensors:
        names = list(tensors.keys())
        assert {tensors.get_tensor(name).dtype for name in names} == {torch.float16}
        assert all(tensors.get_tensor(name).isfinite().all() for name in names)
    for path in FOLDER.rglob("*"):
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}, path


def objects_shown(scene: str) -> str:
    return "objects " + " ".join(sorted(set(scene.split(" .")[0].split()) & set(tasks.OBJECTS)))


def test_held_out_combinations_are_never_trained_on():
    rng = random.Random(SEED)
    trained = {t: [" ".join(tasks.document(t, rng, 0.5).words) for _ in range(400)] for t in tasks.TASKS}
    for e in tasks.draw("indirect_object", 40, SEED):
        assert not any({e.answer, *e.wrong} <= set(text.split()) for text in trained["indirect_object"])
    for e in tasks.draw("capital", 40, SEED):
        if "{name}" not in e.template:
            assert not any(f" {e.prompt} {e.answer}" in f" . {text}" for text in trained["capital"])
    for text in trained["colored_object"]:
        assert {tasks.split_of(objects_shown(scene)) for scene in text.split("Q : ")[1:]} == {"train"}
    for e in tasks.draw("colored_object", 40, SEED):
        assert {tasks.split_of(objects_shown(scene)) for scene in e.prompt.split("Q : ")[1:]} == {"held-out"}


def test_draws_follow_their_seed():
    for task in tasks.TASKS:
        assert tasks.draw(task, 20, 1) == tasks.draw(task, 20, 1) != tasks.draw(task, 20, 2)
    with pytest.raises(ValueError, match="split"):
        tasks.draw("capital", 1, 0, "test")


def start_training(folder: Path) -> subprocess.Popen:
    options = "--steps 4 --every 1 --scale 0.05 --watch 1 --draws 2 --quiet"
    command = [sys.executable, str(FOLDER / "train.py"), "--work", str(folder), "--out", str(folder / "out")]
    return subprocess.Popen(
        [*command, *options.split()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_training_run_resumes_to_the_same_weights(tmp_path):
    whole, broken = start_training(tmp_path / "whole"), start_training(tmp_path / "broken")
    checkpoint = tmp_path / "broken" / "checkpoint.pt"
    until = time.monotonic() + 300
    while not checkpoint.exists() and broken.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert broken.returncode == -signal.SIGKILL
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 4
    assert not (tmp_path / "broken" / "out" / "metrics.json").exists()
    again = start_training(tmp_path / "broken")
    for process in (whole, again):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    one, other = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    metrics = json.loads((tmp_path / "broken" / "out" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 4
