"""The kinds of file that Headwater reads from strangers, each with whole examples and what reads it.

A reader goes on as a user would: a record is asked for its numbers, an experiment is run, a folder's model is called.
"""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_sweeps
import networkx as nx
import numpy as np
import sense_folders
import tiny_models
import torch
from every_edit import SERIAL
from fuzzing import Target, bytes_changed, header_changed, json_changed, tried
from record_files import recorded
from small_experiments import asked

import headwater as hw
from headwater.analyses._corpora.result import Corpus
from headwater.command import inputs, verify
from headwater.lens.errors import HeadwaterError
from headwater.lens.experiments.results import Results
from headwater.lens.journal import Journal
from headwater.lens.media.pictures import picture
from headwater.lens.media.sounds import sound

SAVED = Path(__file__).parents[1] / "saved"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MARKS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": True},
}
GENERATION = {
    "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "bos_token_id": 1,
    "eos_token_id": [2, 5], "pad_token_id": 0, "max_length": 30, "min_new_tokens": 1, "num_beams": 1,
    "cache_implementation": None, "use_cache": True, "suppress_tokens": [3], "bad_words_ids": [[4]],
    "forced_eos_token_id": None, "stop_strings": None, "transformers_version": "5.0.0",
}  # fmt: skip
# kept small, so that a run of an experiment that asks for much is soon over
MOST_PROMPTS = 20


def record(folder: Path) -> Target:
    """Records: bytes changed, and headers changed by somebody who knows the format."""
    path = recorded("gpt2", hw.Redistribute([0]), keep=("qkv", "residual")).save(folder / "a.safetensors")
    whole = [path.read_bytes(), *(file.read_bytes() for file in sorted(SAVED.glob("*.safetensors")))]

    def read(path: Path) -> None:
        found = hw.Record.open(path, verify=True)
        repr(found), found.to_xarray()
        for layer in found.layers[:2]:
            found.map(layer)

    return Target(".safetensors", whole, header_changed, read)


def corpus(folder: Path) -> Target:
    """Statistics of heads over texts."""
    (folder / "texts.jsonl").write_text(
        '{"text": "When Mary and John went"}\n{"text": "Mary gave a drink"}\n'
    )
    hw.corpus(hw.load("tasks-4l"), folder / "texts.jsonl", out=folder / "a.safetensors", keep=2)

    def read(path: Path) -> None:
        found = Corpus.open(path, verify=True)
        found.mean("entropy"), found.find("previous", n=1), Corpus.merge([found])

    return Target(".safetensors", [(folder / "a.safetensors").read_bytes()], header_changed, read)


def experiment(folder: Path) -> Target:
    """Experiment files, which are run where they can be read."""
    whole = [
        asked(measures=["loss", "next_token", "logit_difference", "entropy"]).to_json().encode(),
        asked(edits=[hw.Knockout([3], [0]), hw.EditResidual(1, "add", [0.1] * 256)], measures=["loss"])
        .to_json()
        .encode(),
    ]
    model = hw.load("tasks-4l")

    def read(path: Path) -> None:
        found = hw.Experiment.open(path)
        if found.model == model.name and len(found.prompts) <= MOST_PROMPTS:
            found.run(model, folder=folder)

    return Target(".json", whole, json_changed, read)


def results(folder: Path) -> Target:
    """Results, also with a digest that is right."""
    whole = [(SAVED / "experiment.results.json").read_bytes()]

    def read(path: Path) -> None:
        verify.held(path)
        Results.open(path)

    return Target(".json", whole, json_changed, read)


def journal(folder: Path) -> Target:
    """Files of finished pieces, taken up and begun anew."""
    path = folder / "whole.jsonl"
    with Journal.open(path, {"of": "fuzz"}, HeadwaterError) as kept:
        for number in range(5):
            kept.put(str(number), {"value": number / 3})
    whole = [path.read_bytes()]

    def read(path: Path) -> None:
        for anew in (False, True):
            with Journal.open(path, {"of": "fuzz"}, HeadwaterError, anew=anew) as kept:
                for number in range(5):
                    if (piece := kept.get(str(number))) not in (None, {"value": number / 3}):
                        raise AssertionError(f"piece {number} is {piece!r}")

    return Target(".jsonl", whole, bytes_changed, read)


def circuit(folder: Path, form: str) -> Target:
    """Circuits in one of their forms, written again where they can be read."""
    graph = hw.analyses.read_circuit(SAVED / "circuit.json")
    ending = ".graphml" if form == "graphml" else ".json"
    if form == "mib":
        model = hw.load("tasks-4l")
        pair = ["When Mary and John went to the store , John gave a drink to"]
        other = [pair[0].replace("John gave", "Mary gave")]
        graph = hw.analyses.edge_attribution(
            model, pair, other, answer="Mary", wrong="John", key_values="head"
        )
    whole = hw.analyses.write_circuit(graph, folder / f"whole{ending}", form).read_bytes()  # type: ignore[arg-type]

    def read(path: Path) -> None:
        found = hw.analyses.read_circuit(path)
        assert isinstance(found, nx.DiGraph)
        hw.analyses.write_circuit(found, folder / "again.json")

    return Target(ending, [whole], bytes_changed if form == "graphml" else json_changed, read)


def edits(folder: Path) -> Target:
    """Lists of edits, each put on a model that runs where it fits."""
    model = hw.load(tiny_models.tiny("llama"))
    whole = [json.dumps([each.to_dict()]).encode() for each in SERIAL]
    ids = tiny_models.batch(1, (5,))[0]

    def read(path: Path) -> None:
        with model.edit(*inputs.edits(path)):
            model(ids)

    return Target(".json", whole, json_changed, read)


def in_folder(folder: Path, file: str, families: tuple[str, ...], given: Any = None) -> Target:
    """One file of a model's folder changed; the model is opened and called. `given` is the file where there is none."""
    homes = []
    for family in families:
        home = folder / family
        if family in ("clip", "whisper", "vit_classifier", "t5", "llava"):
            sense_folders.save(family, home)
        else:
            tiny_models.tiny(family).save_pretrained(home)
        if given is not None:
            (home / file).write_text(json.dumps(given))
        if (home / file).is_file():
            homes.append(home)
    whole: dict[bytes, list[Path]] = {}  # several folders may have the same file
    for home in homes:
        whole.setdefault((home / file).read_bytes(), []).append(home)
    last: list[Path] = []  # whose file was changed; nobody's when an input that was kept is tried again

    def change(chance: random.Random, content: bytes) -> bytes:
        last[:] = [chance.choice(whole[content])]
        return (bytes_changed if file.endswith(".safetensors") else json_changed)(chance, content)

    def read(path: Path) -> None:
        for home in last or homes:
            before = (home / file).read_bytes()
            try:
                shutil.copy(path, home / file)
                model = hw.load(home)
                if "text" in model.parts:
                    model.record(tiny_models.batch(1, (5,))[0])
                if file == "generation_config.json":
                    model.generate(tiny_models.batch(1, (5,))[0], 2)
            finally:
                (home / file).write_bytes(before)

    return Target(Path(file).suffix, list(whole), change, read)


def image(folder: Path) -> Target:
    """Pictures in all formats that are read."""
    whole = []
    for form in FORMATS:
        into = io.BytesIO()
        sense_folders.photograph().save(into, form)
        whole.append(into.getvalue())
    return Target(".png", whole, bytes_changed, lambda path: np.asarray(picture(path)))


def audio(folder: Path) -> Target:
    """Sounds."""
    whole = [
        sense_folders.tone(folder / f"{rate}.wav", 0.05, rate).read_bytes() for rate in (8000, 16_000, 44_100)
    ]
    return Target(".wav", whole, bytes_changed, lambda path: sound(path, 16_000))


TARGETS: dict[str, Callable[[Path], Target]] = {
    "record": record,
    "corpus": corpus,
    "sweep": fuzz_sweeps.sweep,
    "run_manifest": fuzz_sweeps.manifest,
    "run_ledger": fuzz_sweeps.ledger,
    "run_unit": fuzz_sweeps.unit,
    "experiment": experiment,
    "results": results,
    "journal": journal,
    "circuit": functools.partial(circuit, form="json"),
    "circuit_graphml": functools.partial(circuit, form="graphml"),
    "circuit_viewer": functools.partial(circuit, form="neuronpedia"),
    "circuit_mib": functools.partial(circuit, form="mib"),
    "edits": edits,
    "config": functools.partial(
        in_folder, file="config.json", families=("gpt2", "llama", "gptoss", "bert", "clip")
    ),
    "weights": functools.partial(in_folder, file="model.safetensors", families=("gpt2", "llama")),
    "tokenizer": functools.partial(in_folder, file="tokenizer.json", families=("t5", "whisper")),
    "tokenizer_config": functools.partial(
        in_folder, file="tokenizer_config.json", families=("t5", "whisper")
    ),
    "special_tokens_map": functools.partial(
        in_folder, file="special_tokens_map.json", families=("t5", "whisper"), given=MARKS
    ),
    "generation_config": functools.partial(
        in_folder, file="generation_config.json", families=("gpt2", "llama"), given=GENERATION
    ),
    "processor": functools.partial(
        in_folder, file="preprocessor_config.json", families=("clip", "whisper", "vit_classifier")
    ),
    "image": image,
    "audio": audio,
}


if (
    __name__ == "__main__"
):  # `python tests/support/fuzz_targets.py [NAME…]`: how many inputs of each kind were tried
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TARGETS:
        with tempfile.TemporaryDirectory() as made:
            count = tried(name, TARGETS[name](Path(made)), Path(made))
        print(json.dumps({"name": name, "inputs": count}), flush=True)
