"""A corpus in the place of prompts: streamed, contained, and part of what a run is of."""

import itertools
import json
import os
from typing import Any

import pytest
import xarray as xr
from sweep_engines import Here, asked, open_once

import headwater as hw
from headwater.analyses._sweeps import texts as module, worker
from headwater.analyses._sweeps.run_sweep import resume
from headwater.analyses._sweeps.texts import Corpus, Texts
from headwater.lens.errors import HeadwaterError, PromptError, SweepError

LINES = [
    "Mary gave John a drink",
    "",
    "Mary went to the store and John gave Mary a drink",
    "  ",
    "John",
    "Mary",
    "Mary",
]
KEPT = [text for text in LINES if text.strip()]


@pytest.fixture
def here(monkeypatch):
    """Runs in this process; it gives the engines that were started, in a list."""
    started = []
    open_once(monkeypatch)

    def engine(kind, setup, sweep, workers):
        started.append(Here(setup, {}))
        return started[-1]

    monkeypatch.setattr("headwater.analyses._sweeps.run_sweep._engine", engine)
    return started


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    write(folder / "texts.jsonl", LINES)
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def of_corpus(corpus: Any = "texts.jsonl", **more):
    analyses = [{"analysis": "rollout"}, {"analysis": "sink_rate"}]
    return asked(**{"prompts": [], "corpus": corpus, "analyses": analyses, "layers": [[0, 1], [2]]} | more)


def run(sweep, folder, base, **more):
    return hw.run_sweep(sweep, folder, base=base, workers=2, **more)


def test_numbers_are_those_of_direct_calls_and_blank_texts_are_left_out(here, base, tmp_path):
    sweep = of_corpus({"path": "texts.jsonl", "length": 6})
    found = run(sweep, tmp_path / "a", base)
    assert found.counts() == {"queued": 0, "done": 5 * 4, "failed": 0}
    assert len(sweep.units(base)) == 20
    model = hw.load("tasks-4l")
    seen = set()
    for unit, result in found.results():
        text = KEPT[unit["at"]]
        ids = model.to_tokens(text).ids[0].tolist()
        cut = len(ids) > 6
        line = {0: 1, 1: 3, 2: 5, 3: 6, 4: 7}[unit["at"]]
        assert unit["given"] == {"where": f"texts.jsonl:{line}", "tokens": min(6, len(ids)), "cut": cut}
        record = model.record(ids[:6] if cut else text, layers=unit["layers"])
        xr.testing.assert_identical(getattr(hw.analyses, unit["analysis"])(record), result)
        seen.add((cut, unit["at"]))
    assert {cut for cut, _ in seen} == {True, False}
    assert [found.units[n].at for n in range(5)] == [0, 1, 2, 3, 4]


def test_shards_in_any_order_are_the_whole(here, base, tmp_path):
    whole = run(of_corpus(), tmp_path / "whole", base)
    shards = [run(of_corpus(), tmp_path / f"{n}", base, shard=(n, 3)).path for n in (1, 2, 3)]
    for n, order in enumerate(itertools.permutations(shards)):
        merged = hw.merge_runs(order, tmp_path / f"merged{n}")
        assert merged.digest() == whole.digest()
        assert merged.counts()["done"] == 20


def test_a_run_is_taken_up_and_a_changed_corpus_is_refused(here, base, tmp_path):
    found = run(of_corpus(), tmp_path / "a", base)
    digest = found.digest()
    for number in (1, 3, 19):
        found.file(found.table().set_index("number").key[number]).unlink()
    assert resume(tmp_path / "a", base=base).digest() == digest
    assert sorted(here[1].tasks) == [1, 3, 19]
    kept = (base / "texts.jsonl").read_text()
    for wrong in (LINES[:-1], [*LINES, "John"], LINES[::-1], [*LINES[:-1], "John"], ["", *LINES]):
        write(base / "texts.jsonl", wrong)
        with pytest.raises(SweepError, match=r"of another run: (corpus|texts) is"):
            resume(tmp_path / "a", base=base)
        run(of_corpus(), tmp_path / "b", base)
        with pytest.raises(SweepError, match="of different runs"):
            hw.merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
        os.rename(tmp_path / "b", tmp_path / f"b{len(here)}")
    (base / "texts.jsonl").write_text(kept)
    assert resume(tmp_path / "a", base=base).digest() == digest
    assert run(of_corpus({"path": "texts.jsonl", "texts": 3}), tmp_path / "c", base).counts()["done"] == 8


@pytest.mark.parametrize("change", [["Mary", *LINES[1:]], LINES[:2], ["Mary"] * 2 + [3]])
def test_a_text_that_changes_while_the_run_goes_on_stops_it(here, base, tmp_path, monkeypatch, change):
    """What was computed stays; when the text is back, the run goes on."""
    kept = (base / "texts.jsonl").read_text()
    plain = Here.give

    def give(self, number, tasks):
        if len(self.tasks) >= 3:
            write(base / "texts.jsonl", change)
        plain(self, number, tasks)

    monkeypatch.setattr(Here, "give", give)
    with pytest.raises(SweepError, match="the corpus changed while the run went on: "):
        run(of_corpus(), tmp_path / "a", base)
    assert hw.SweepRun(tmp_path / "a").counts()["failed"] == 0
    monkeypatch.setattr(Here, "give", plain)
    (base / "texts.jsonl").write_text(kept)
    assert resume(tmp_path / "a", base=base).digest() == run(of_corpus(), tmp_path / "b", base).digest()


def test_a_corpus_that_changes_while_keys_are_made_is_refused(here, base, tmp_path, monkeypatch):
    plain = Texts.facts

    def facts(self):
        found = plain(self)
        write(base / "texts.jsonl", [*LINES, "John"])
        return found

    monkeypatch.setattr(Texts, "facts", facts)
    with pytest.raises(SweepError, match="changed while it was read; begin again"):
        run(of_corpus(), tmp_path / "a", base)
    assert hw.SweepRun(tmp_path / "a").counts()["queued"] == 0


def test_texts_are_read_one_after_the_other(base):
    """A later text is read on from where the reader stands, an earlier one from the beginning."""
    texts = Texts(Corpus(path="texts.jsonl"), base)
    assert [row.text for row in texts.rows()] == KEPT
    for number in (0, 1, 3, 4, 2, 2, 0):
        assert texts.at(number).text == KEPT[number]
        assert texts.at(number).number == number
    with pytest.raises(SweepError, match="has no text 5"):
        texts.at(5)
    assert texts.at(4).text == "Mary"


def test_no_more_than_a_text_is_in_memory(base, monkeypatch):
    """The file is opened once for a pass in order."""
    opened = []
    plain = module.Source.__iter__

    def counting(self):
        opened.append(0)
        return plain(self)

    monkeypatch.setattr(module.Source, "__iter__", counting)
    texts = Texts(Corpus(path="texts.jsonl"), base)
    for number in range(5):
        texts.at(number)
    assert len(opened) == 1


def test_other_files_are_read_as_a_corpus_reads_them(here, base, tmp_path):
    (base / "some").mkdir()
    (base / "some" / "b.txt").write_text("John went\n\nMary gave John a drink\n")
    (base / "some" / "a.jsonl").write_text('{"prose": "Mary"}\n')
    corpus = {"path": "some", "field": "prose", "unit": "paragraph"}
    found = run(of_corpus(corpus, layers=[]), tmp_path / "a", base)
    where = [unit["given"]["where"] for unit, _ in found.results()]
    assert where == ["a.jsonl:1", "b.txt:1", "b.txt:3"] * 2


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../texts.jsonl", "a/../../b.txt", "C:\\a.txt", "a\n.txt", "a\0.txt", ""]
)
def test_paths_that_lead_elsewhere_are_refused(path):
    with pytest.raises(SweepError) as caught:
        of_corpus(path)
    assert "\n" not in str(caught.value)


def test_files_that_lie_elsewhere_or_are_no_texts_are_refused(here, base, tmp_path):
    (tmp_path / "secret.txt").write_text("a secret")
    (base / "link.txt").symlink_to(tmp_path / "secret.txt")
    (base / "folder").symlink_to(tmp_path)
    (base / "inner").mkdir()
    (base / "inner" / "link.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(base / "pipe.txt")
    (base / "blank.txt").write_text(" \n")
    (base / "wrong.jsonl").write_text('{"text": "Mary"}\n{"text": 3}\n')
    (base / "twice.jsonl").write_text('{"text": "Mary", "text": "John"}\n')
    (base / "weights.bin").write_text("x")
    for path, words in {
        "link.txt": "does not lie in the sweep's folder", "folder": "does not lie in the sweep's folder",
        "inner": "holds no texts", "pipe.txt": "holds no texts", "blank.txt": "nothing but blank texts",
        "wrong.jsonl": "line 2 has no text", "twice.jsonl": "line 1", "weights.bin": "none of the files",
        "absent.txt": "there is no",
    }.items():  # fmt: skip
        with pytest.raises(HeadwaterError, match=words) as caught:
            run(of_corpus(path), tmp_path / path, base)
        assert "\n" not in str(caught.value)
    assert not here


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": ["Mary"]}, "reads prompts or a corpus"),
        ({"analyses": [{"analysis": "head_roles"}], "layers": []}, "no analysis of the sweep reads a corpus; leave it"),
        ({"corpus": {"path": "a.txt", "feld": "b"}}, r"corpus\.feld is no key of the sweep: did you mean 'field'"),
        ({"corpus": {"path": "a.txt", "unit": "word"}}, "unit"),
        ({"corpus": {"path": "a.txt", "texts": 0}}, "texts"),
        ({"corpus": {"path": "a.txt", "length": 1}}, "length"),
        ({"corpus": None}, "reads prompts, and the sweep has none"),
        ({"seeds": list(range(100_000)), "edits": {f"e{n}": [] for n in range(10_000)}}, "the most is 100,000,000"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(change, words):
    with pytest.raises(HeadwaterError, match=words) as caught:
        of_corpus(**change)
    assert "\n" not in str(caught.value)


def test_lengths_that_the_model_does_not_hold_are_refused(here, base, tmp_path):
    with pytest.raises(HeadwaterError, match="length=99999 does not fit"):
        run(of_corpus({"path": "texts.jsonl", "length": 99999}), tmp_path / "a", base)


def test_how_many_units_there_are_is_known_when_the_texts_are_counted(base):
    with pytest.raises(SweepError, match=r"ask sweep\.units\(base\)"):
        len(of_corpus())
    assert len(of_corpus().units(base)) == 20


def test_a_text_that_the_tokenizer_does_not_take_is_named(here, base, tmp_path):
    (base / "texts.jsonl").write_text('"Mary"\n"a \\ud800 b"\n')
    with pytest.raises(PromptError, match=r"texts\.jsonl:2: "):
        run(of_corpus(), tmp_path / "a", base)


@pytest.mark.parametrize("texts", [None, 0, -1, 2.0, True, 10**9])
def test_a_manifest_without_the_count_of_texts_is_refused(here, base, tmp_path, texts):
    found = run(of_corpus(), tmp_path / "a", base)
    file = tmp_path / "a" / "manifest.json"
    told = json.loads(file.read_text())
    told["facts"]["texts"] = texts
    told["digest"] = type(found.manifest)(told["sweep"], told["facts"], "").digest
    file.write_text(json.dumps(told))
    with pytest.raises(SweepError, match="does not say how many texts"):
        hw.SweepRun(tmp_path / "a").table()


def test_workers_do_not_read_the_corpus_whole(here, base, tmp_path, monkeypatch):
    """Its digest is the driver's work; a worker holds each text to the key of its unit."""
    found = run(of_corpus(), tmp_path / "a", base)
    monkeypatch.setattr(Texts, "facts", lambda self: pytest.fail("read whole"))
    opened = worker.Worker(worker.Setup(str(base), str(tmp_path / "a")))
    assert opened.facts == found.manifest.facts
