"""Experiments are data: JSON there and back, and bad files in one line.

Seen to fail with `within` not resolving links.
"""

from __future__ import annotations

import json

import pytest
from small_experiments import EDITS, PROMPT, asked

import headwater as hw
from headwater.lens.errors import ExperimentError, HeadwaterError
from headwater.lens.experiments.run_file import run_file
from headwater.lens.files import within


@pytest.fixture(scope="module")
def model():
    return hw.load("tasks-4l")


def test_json_there_and_back():
    given = asked(measures=["loss", "attention:1.2"], seed=3, revision="sha256:0", tolerance=1e-3)
    read = hw.Experiment.from_json(given.to_json())
    assert read == given
    assert read.inputs_digest() == given.inputs_digest()
    assert read.edits_made() == EDITS
    assert asked(seed=4).inputs_digest() != asked(seed=5).inputs_digest()
    assert asked(versions={}).inputs_digest() == asked().inputs_digest(), "versions decide nothing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1"),
        (b'{"model": }', "line 1, column 11"),
        (b"[1]", "holds a list"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "too large a number"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe{\x00", "UTF-8"),
        (b" " * (16 * 2**20 + 1), "larger than 16 MiB"),
        ({"model": "x"}, "prompts: Field required"),
        ({"prompts": []}, "prompts: List should have at least 1 item"),
        ({"promts": []}, "promts is no key of the experiment: did you mean 'prompts'"),
        ({"seed": "1"}, "seed: Input should be a valid integer; got '1'"),
        ({"seed": -1}, "seed"),
        ({"tolerance": 0}, "tolerance"),
        ({"format": 2}, "format"),
        ({"measures": ["los"]}, "unknown measure 'los': did you mean 'loss'"),
        ({"measures": ["attention:x"]}, "layer.head"),
        ({"edits": [{"edit": "Knockot"}]}, "unknown edit 'Knockot'"),
        ({"edits": [3]}, "an edit is an object"),
        ({"prompts": [{"text": "a", "tokens": [1]}]}, "not both"),
        ({"prompts": [{"txt": "a"}]}, "prompts.0.txt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_files_are_refused_in_one_line(content, words, tmp_path):
    file = tmp_path / "run.json"
    if isinstance(content, dict):
        base = {} if content == {"model": "x"} else {"prompts": ["a"]}
        content = json.dumps({"model": "tasks-4l"} | base | content).encode()
    file.write_bytes(content)
    with pytest.raises(HeadwaterError) as caught:
        hw.Experiment.open(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_outside_of_the_folder_is_read_or_written(model, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    record = model.record(PROMPT).save(outside / "r.safetensors")
    (inside / "link.safetensors").symlink_to(record)
    for name in (str(record), "../out/r.safetensors", "link.safetensors", "a\0b.safetensors"):
        given = asked(edits=[hw.FreezeAttention(name).to_dict()], measures=["loss"])
        with pytest.raises(ExperimentError, match="does not lie in the experiment's folder"):
            given.run(model, folder=inside)
        assert within(inside, name) is None
    for name in ("../out", "/etc", str(outside), "~/x", "a/../../b", "x/y/z"):
        with pytest.raises(ExperimentError, match="no hub id"):
            asked(model=name).load(inside)
    file = asked(measures=["loss"]).save(inside / "run.json")
    (inside / "run.results.json").symlink_to(outside / "victim")
    with pytest.raises(ExperimentError, match="is a link"):
        run_file(file, model)
    assert [p.name for p in outside.iterdir()] == ["r.safetensors"]
    record.rename(inside / "r.safetensors")
    found = asked(edits=[hw.FreezeAttention("r.safetensors").to_dict()], measures=["loss"]).run(
        model, folder=inside
    )
    assert found.results[0]["after"]["loss"] == pytest.approx(found.results[0]["before"]["loss"], abs=1e-4)


def test_other_weights_and_answers_that_are_no_token_are_refused(model):
    with pytest.raises(ExperimentError, match="is of weights sha256:0, tasks-4l has model-sha256:"):
        asked(revision="sha256:0").run(model)
    with pytest.raises(HeadwaterError, match="prompt 0: answer='xylophone' is not one token"):
        asked(prompts=[{"text": PROMPT, "answer": "xylophone"}], measures=["probability"]).run(model)
    with pytest.raises(ExperimentError, match="probability needs 'answer'"):
        asked(prompts=[PROMPT], measures=["probability"]).run(model)
    with pytest.raises(ExperimentError, match="prompt 0: token id 99999"):
        asked(prompts=[{"tokens": [99999]}]).run(model)


def test_prepend_bos_decides_how_the_texts_begin(model):
    bare = asked(edits=[], measures=["loss"], prepend_bos=False)
    assert hw.Experiment.from_json(bare.to_json()) == bare
    assert bare.inputs_digest() != asked(edits=[], measures=["loss"]).inputs_digest()
    assert "prepend_bos" not in asked().model_dump(exclude_defaults=True)
    found = bare.run(model).results[0]["before"]["loss"]
    assert found == pytest.approx(model.loss(PROMPT, prepend_bos=False).item(), abs=1e-6)
    assert abs(found - model.loss(PROMPT).item()) > 1e-3
    begun = hw.load("tasks-4l", prepend_bos=True)
    with pytest.raises(
        ExperimentError, match="prepend_bos=True and the experiment says False; load it without"
    ):
        bare.run(begun)
    with pytest.raises(ExperimentError, match="prepend_bos: Input should be a valid boolean"):
        asked(prepend_bos="no")
    ids = asked(edits=[], measures=["loss"], prepend_bos=True, prompts=[{"tokens": [5, 6, 7]}])
    assert ids.run(model).results[0]["before"]["loss"] == pytest.approx(
        model.loss([[5, 6, 7]]).item(), abs=1e-6
    )
