"""Settings beside the weights name no file of another folder, and have nothing looked up elsewhere.

Seen to fail on the code that gave such settings to transformers: `special_tokens_map.json` chose the vocabulary, and
the processor opened the second model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sense_folders
import transformers

import headwater as hw
from headwater.lens.errors import ModelError, PromptError
from headwater.lens.examples import settings_files

CONFIG, MAP = settings_files.TOKENIZERS
# what transformers' code of processors looks up, by the file that does it; settings_files refuses each
LOOKING_UP = {
    "image_processing_oneformer.py", "image_processing_pil_oneformer.py", "processing_mgp_str.py",
    "processing_bark.py", "processing_wav2vec2_with_lm.py",
    "image_processing_pix2struct.py", "image_processing_pil_pix2struct.py",  # a font, where a text is drawn
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sense_folders.save("t5", tmp_path / "model")


def put(file: Path, **settings: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | settings))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        hw.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [CONFIG, MAP])
@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "vocab", "gguf_file", "sp_model_kwargs"])
def test_a_tokenizer_names_no_file_elsewhere(file: str, key: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("secret\n")
    for named in (str(tmp_path / "other"), "../other"):
        put(folder / file, **{key: {"model_file": named} if key == "sp_model_kwargs" else named})
        refused(folder, "which is no file of its folder; leave it out")


@pytest.mark.parametrize("key", ["init_inputs", "sudachi_config_path", "mecab_option"])
def test_what_other_libraries_open_is_not_taken(key: str, folder: Path) -> None:
    put(folder / CONFIG, **{key: []})
    hw.load(folder)
    put(folder / CONFIG, **{key: ["x"]})
    refused(folder, "names what lies elsewhere")


def test_names_of_no_file_and_of_files_of_the_folder_are_taken(folder: Path, tmp_path: Path) -> None:
    plain = hw.load(folder).tokenizer.get_vocab()
    (tmp_path / "other").write_text("secret\n")
    elsewhere = dict.fromkeys(("name_or_path", "special_tokens_map_file"), str(tmp_path / "other"))
    put(folder / CONFIG, vocab_file="/home/nobody/vocab.txt", tokenizer_file="tokenizer.json", **elsewhere)
    assert hw.load(folder).tokenizer.get_vocab() == plain


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "x"}}, "a second model"),
        ("audio_tokenizer_config.json", {}, "a second model"),
        ("speaker_embeddings_path.json", {}, "files of voices"),
        ("preprocessor_config.json", {"class_info_file": "x.json"}, "a file of a hub"),
        ("preprocessor_config.json", {"processor_class": "MgpstrProcessor"}, "tokenizers of a hub"),
        ("tokenizer_config.json", {"processor_class": "Wav2Vec2ProcessorWithLM"}, "a language model"),
        ("second_tokenizer/special_tokens_map.json", {"vocab_file": "{other}"}, "no file of its folder"),
        ("preprocessor_config.json", {"size_file": "{other}"}, "no file of its folder"),
    ],
)  # fmt: skip
def test_a_processor_has_nothing_looked_up(
    file: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """The model opens; its processor is not made."""
    (tmp_path / "other").write_text("{}")
    home = sense_folders.save("clip", tmp_path / "model")
    name = next(iter(settings), "")
    if settings.get(name) == "{other}":
        settings = {name: str(tmp_path / "other")}
    put(home / file, **settings)
    if file.startswith("second"):
        refused(home, words)
        return
    with pytest.raises(PromptError, match=words):
        hw.load(home).record(hw.Example(text="the cat", image=sense_folders.photograph()))


def test_code_that_a_folder_brings_never_runs(tmp_path: Path) -> None:
    home = sense_folders.save("clip", tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nMine = generate = None\n"
    (home / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (home / name).write_text(code)
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    for name in ("config.json", CONFIG, "preprocessor_config.json"):
        put(home / name, auto_map=dict.fromkeys(kinds, "evil.Mine"))
    hw.load(home).record(hw.Example(text="the cat", image=sense_folders.photograph()))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "most"),
    [("generation_config.json", 2**20), ("additional_chat_templates/a.jinja", 2**28), ("a.tiktoken", 2**28)],
)
def test_files_beside_the_weights_are_bounded(name: str, most: int, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(most + 1)  # without blocks on the disk
    refused(folder, f"is larger than {most // 2**20} MiB; such a file is smaller")


def test_no_other_code_of_processors_looks_something_up() -> None:
    """transformers' own; a version of it that adds some fails here."""
    fetching = re.compile(
        r"""hf_hub_download\(|from_pretrained\(["']|load_from_dir\(|speaker_embeddings_path ="""
    )
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/*process*.py"):
        code = [
            line for line in file.read_text("utf-8").splitlines() if ">>>" not in line and "..." not in line
        ]
        if any(fetching.search(line) for line in code):
            found.add(file.name)
    examples = {"processing_idefics.py", "processing_voxtral.py"}  # in docstrings
    assert {name for name in found - examples if not name.endswith("_auto.py")} <= LOOKING_UP
