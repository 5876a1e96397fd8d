"""Experiments: data that runs again and says whether it agrees; bad files in one line; an interrupted run goes on.

Seen to fail with edits on in the "before" run, with the digest not compared, with the journal's first line not read,
with `within` not resolving links, and with `math.isclose` replaced by True.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import ExperimentError, HeadwaterError
from headwater.lens.experiments.results import Results
from headwater.lens.experiments.run_file import run_file
from headwater.lens.files import within

PROMPT = "When Mary and John went to the store , John gave a drink to"
EDITS = [hw.Redistribute([0], 0.2), hw.ScaleHeads({"1.1": 0.5}), hw.Knockout(slice(-2, None), [1])]


@pytest.fixture(scope="module")
def model():
    return hw.load("tasks-4l")


def asked(**more):
    prompts = [{"text": PROMPT, "answer": "Mary", "wrong": ["John"]}, PROMPT, {"tokens": [1, 20, 30]}]
    return hw.Experiment(**{"model": "tasks-4l", "prompts": prompts[:1], "edits": EDITS} | more)


def test_json_there_and_back():
    given = asked(measures=["loss", "attention:1.2"], seed=3, revision="sha256:0", tolerance=1e-3)
    read = hw.Experiment.from_json(given.to_json())
    assert read == given
    assert read.inputs_digest() == given.inputs_digest()
    assert read.edits_made() == EDITS
    assert asked(seed=4).inputs_digest() != asked(seed=5).inputs_digest()
    assert asked(versions={}).inputs_digest() == asked().inputs_digest(), "versions decide nothing"


def test_every_measure_is_what_the_library_gives(model):
    names = [
        "loss",
        "next_token",
        "logit_difference",
        "probability",
        "similarity",
        "entropy",
        "attention:2.1",
    ]
    found = asked(measures=names).run(model).results[0]
    mary, john = (model.tokenizer.convert_tokens_to_ids(word) for word in ("Mary", "John"))
    plain = model.embeddings(PROMPT)[0]
    for when, edits in (("before", []), ("after", EDITS)):
        with model.edit(*edits):
            logits, loss = model(PROMPT)[0, -1].double(), model.loss(PROMPT)
            record, hidden = model.record(PROMPT), model.embeddings(PROMPT)[0]
        values = found[when]
        assert values["loss"] == float(loss[0])
        assert values["next_token"]["ids"] == logits.topk(10).indices.tolist()
        assert values["next_token"]["probabilities"][0] == pytest.approx(float(logits.softmax(-1).max()))
        assert values["logit_difference"] == pytest.approx(float(logits[mary] - logits[john]))
        assert values["probability"] == pytest.approx(float(logits.softmax(-1)[mary]))
        cosines = (plain * hidden).sum(-1) / plain.norm(dim=-1) / hidden.norm(dim=-1)
        assert values["similarity"] == pytest.approx(float(cosines.mean()), abs=1e-5)
        means = record.statistic("entropy")[0].mean("query").values
        assert torch.tensor(values["entropy"]).allclose(torch.tensor(means).float(), atol=1e-6)
        assert torch.tensor(values["attention:2.1"]).allclose(record.pattern(2, 1)[0])
    assert found["before"]["loss"] != found["after"]["loss"]
    assert model.edits == ()


def test_without_edits_there_is_no_after_and_models_in_memory_run(tmp_path):
    hooked = hw.load(tiny_models.tiny("bert"))
    given = hw.Experiment(model="x", prompts=[{"tokens": [5, 6, 7]}], measures=["similarity", "entropy"])
    assert list(given.run(hooked).results[0]) == ["before"]
    with pytest.raises(HeadwaterError, match="no next-token loss"):
        hw.Experiment(model="x", prompts=[{"tokens": [5, 6, 7]}]).run(hooked)
    with pytest.raises(ExperimentError, match="has edits on already"), hooked.edit(hw.TowardIdentity(0.5)):
        given.run(hooked)


def test_a_second_run_verifies_and_a_changed_number_is_found(model, tmp_path):
    file = asked(measures=["loss", "entropy"]).save(tmp_path / "run.json")
    first = run_file(file, model)
    assert (first.verified, first.path) == (None, tmp_path / "run.results.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.results.json"]
    written = first.path.read_bytes()
    second = run_file(file, model)
    assert second.verified is True
    assert second.largest == 0
    assert second.results.digest == first.results.digest
    assert first.path.read_bytes() == written

    data = json.loads(written)
    data["results"][0]["after"]["loss"] += 1e-3
    first.path.write_text(json.dumps(data))
    with pytest.raises(ExperimentError, match="changed after it was written"):
        run_file(file, model)
    forged = Results(**{n: data[n] for n in Results.__dataclass_fields__})
    first.path.write_text(forged.to_json())
    third = run_file(file, model)
    assert third.verified is False
    assert third.differing == ["results.0.after.loss"]
    assert third.largest == pytest.approx(1e-3)
    asked(measures=["loss", "entropy"], tolerance=1e-2).save(file)
    with pytest.raises(ExperimentError, match="another version of this experiment"):
        run_file(file, model)


def test_the_digest_is_sha256_of_canonical_json(model):
    """Written again by hand, as another program would check it."""
    results = asked(measures=["loss"]).run(model)
    content = {"inputs": results.inputs, "revision": results.revision, "results": results.results}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert results.digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_an_interrupted_run_goes_on_where_it_was(model, tmp_path):
    file = asked(prompts=[PROMPT, "Mary and John went", "the store"], measures=["loss"]).save(
        tmp_path / "run.json"
    )

    def stop(done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_file(file, model, stop)
    assert model.edits == ()
    journal = tmp_path / "run.partial.jsonl"
    assert len(journal.read_text().splitlines()) == 3
    assert not (tmp_path / "run.results.json").exists()
    journal.write_text(journal.read_text() + '{"prompt": 2, "resu')  # as if killed within a line
    told = []
    outcome = run_file(file, model, lambda done, of: told.append((done, of)))
    assert told == [(3, 3)]
    assert not journal.exists()
    (tmp_path / "run.results.json").unlink()
    assert run_file(file, model).results.results == outcome.results.results
    # a changed digit is measured again, and so are the lines behind it
    (tmp_path / "run.results.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run_file(file, model, stop)
    text = journal.read_text()
    value = outcome.results.results[0]["after"]["loss"]
    journal.write_text(text.replace(str(value), str(value + 1)))
    assert journal.read_text() != text
    assert run_file(file, model).results.results == outcome.results.results
    # a journal of another experiment is not taken up
    (tmp_path / "run.results.json").unlink()
    journal.write_text('{"inputs": "other"}\n{"prompt": 0, "result": {"before": {"loss": 0.0}}}\n')
    assert run_file(file, model).results.results == outcome.results.results


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
        ({"hads": []}, "hads: Extra inputs are not permitted"),
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
    with pytest.raises(ExperimentError, match="is of weights sha256:0, tasks-4l has sha256:"):
        asked(revision="sha256:0").run(model)
    with pytest.raises(HeadwaterError, match="prompt 0: 'xylophone' is not one token"):
        asked(prompts=[{"text": PROMPT, "answer": "xylophone"}], measures=["probability"]).run(model)
    with pytest.raises(ExperimentError, match="probability needs 'answer'"):
        asked(prompts=[PROMPT], measures=["probability"]).run(model)
    with pytest.raises(ExperimentError, match="prompt 0: token id 99999"):
        asked(prompts=[{"tokens": [99999]}]).run(model)


def test_two_runs_of_one_file_do_not_meet(model, tmp_path):
    file = asked(prompts=[PROMPT, "the store"], measures=["loss"]).save(tmp_path / "run.json")

    def again(done, of):
        with pytest.raises(ExperimentError, match="in use by another run"):
            run_file(file, model)

    first = run_file(file, model, again)
    assert (first.verified, sorted(p.name for p in tmp_path.iterdir())) == (
        None,
        ["run.json", "run.results.json"],
    )


def test_results_of_any_size_are_read_by_the_version_that_wrote_them(model, tmp_path):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    target = run_file(file, model).path
    target.write_text(target.read_text() + " " * (17 * 2**20))
    assert run_file(file, model).verified is True


@pytest.mark.parametrize("held", ["[5]", "[]", "5", '[{"after": {}}]', '[{"before": 3}]'])
def test_results_of_odd_types_are_refused_in_one_line(held, model, tmp_path):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    target = run_file(file, model).path
    data = json.loads(target.read_text()) | {"results": json.loads(held)}
    target.write_text(Results(**{n: data[n] for n in Results.__dataclass_fields__}).to_json())
    with pytest.raises(ExperimentError, match="holds no results of an experiment"):
        run_file(file, model)


def test_a_loss_that_is_no_number_is_refused_in_one_line(model, tmp_path, monkeypatch):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    monkeypatch.setattr(type(model), "loss", lambda self, found: torch.tensor([float("nan")]))
    with pytest.raises(ExperimentError, match=r"^prompt 0.before.loss is nan, which results can not hold"):
        run_file(file, model)


def test_a_full_disk_leaves_the_old_results(model, tmp_path, monkeypatch):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExperimentError, match="No space left"):
        run_file(file, model)
    monkeypatch.undo()
    assert sorted(Path(p).name for p in tmp_path.iterdir()) == ["run.json", "run.partial.jsonl"]
    assert run_file(file, model).verified is None
