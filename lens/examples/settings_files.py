"""Settings of tokenizers, processors and generation in a model's folder, checked before transformers reads them.

They are data from strangers, and transformers opens what they name: a vocabulary, a file of classes, the folder of a
second model, what a hub holds under a name. Here a setting may name a file of its folder and no other; settings for
which something is looked up elsewhere are refused. Files are bounded in size. What lies in a folder within the folder
is checked as well, since processors keep a second tokenizer there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwater.lens.errors import ModelError
from headwater.lens.files import parse_json, read_text

TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
OTHERS = ("generation_config.json", "chat_template.json")
MOST_BYTES = {**dict.fromkeys(TOKENIZERS, 2**26), **dict.fromkeys((*PROCESSORS, *OTHERS), 2**20)}
READ, LARGEST = (".json", ".model", ".txt", ".jinja", ".spm", ".tiktoken", ".bpe", ".codes"), 2**28
WORDS = re.compile(r".*_token|content|chat_template|name_or_path|special_tokens_map_file")  # name no files
ELSEWHERE = re.compile(
    r"(?!name_or_path).*_(path|dir|option)|init_inputs"
)  # of tokenizers: what libraries beside transformers open
LOOKED_UP = {  # settings of a processor
    "audio_tokenizer": "a second model", "repo_path": "a file of a hub", "class_info_file": "a file of a hub",
    "speaker_embeddings": "files of voices",
}  # fmt: skip
FILES_LOOKED_UP = {
    "audio_tokenizer_config.json": "a second model", "speaker_embeddings_path.json": "files of voices"
}  # fmt: skip
# their code fetches tokenizers of other models, or reads a language model
KINDS = {"MgpstrProcessor": "tokenizers of a hub", "Wav2Vec2ProcessorWithLM": "a language model"}
KINDS_OF = {"mgp-str": "tokenizers of a hub"}  # where the configuration alone decides the kind
Told = Iterator[tuple[str, Any]]


def check_sizes(folder: Path) -> None:
    """ModelError for a file beside the weights that is larger than transformers should read."""
    for place in (folder, *_within(folder)):
        for file in _held(place):
            most = MOST_BYTES.get(file.name, LARGEST if file.suffix in READ else None)
            if most is not None and file.is_file() and file.stat().st_size > most:
                raise ModelError(f"{file} is larger than {most / 2**20:g} MiB; such a file is smaller")


def check_tokenizers(folder: Path) -> None:
    """ModelError where the settings of a tokenizer name a file of another folder."""
    for place in (folder, *_within(folder)):
        for name in TOKENIZERS:
            for key, value in _settings(place / name):
                if value and ELSEWHERE.fullmatch(key):
                    raise ModelError(
                        f"{place / name}: {key} names what lies elsewhere, which is not read; leave it out"
                    )
                _refuse_file_elsewhere(place / name, key, value, folder)


def check_processors(folder: Path) -> None:
    """ModelError where the settings of a processor have something looked up that is not in their folder."""
    check_tokenizers(folder)
    mend = "give load(…, processor=…)"
    for place in (folder, *_within(folder)):
        for name, what in FILES_LOOKED_UP.items():
            if (place / name).exists():
                raise ModelError(f"{place / name} has {what} looked up; {mend}")
        for name in (*PROCESSORS, *TOKENIZERS):
            for key, value in _settings(place / name):
                if name in PROCESSORS and key in LOOKED_UP and value is not None:
                    raise ModelError(
                        f"{place / name}: {key} has {LOOKED_UP[key]} looked up, which is not read; {mend}"
                    )
                if isinstance(value, str) and value in KINDS:
                    raise ModelError(
                        f"{place / name}: a {value} looks up {KINDS[value]}, which are not read; {mend}"
                    )
                if name in PROCESSORS:
                    _refuse_file_elsewhere(place / name, key, value, folder)
    for key, value in _settings(folder / "config.json"):
        if key == "model_type" and isinstance(value, str) and value in KINDS_OF:
            raise ModelError(
                f"the processor of a {value} looks up {KINDS_OF[value]}, which are not read; {mend}"
            )


def _within(folder: Path) -> list[Path]:
    """The folders in a folder; what they hold is read by transformers, deeper ones are not."""
    return [each for each in _held(folder) if each.is_dir() and not each.name.startswith(".")]


def _held(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where it can not be looked into."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _settings(file: Path) -> Told:
    """Every key of a file with its value, at any depth; nothing where there is no such file."""
    if not file.is_file():
        return
    most = MOST_BYTES.get(file.name, 2**20)
    content = parse_json(
        read_text(file, most, ModelError, "such a file is smaller"), str(file), ModelError, finite=False
    )
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object; got {type(content).__name__}")
    yield from _keys(content)


def _keys(value: Any) -> Told:
    if isinstance(value, dict):
        yield from value.items()
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(each)


def _refuse_file_elsewhere(file: Path, key: str, value: Any, folder: Path) -> None:
    if not isinstance(value, str) or not value or WORDS.fullmatch(key):
        return
    for named in (Path(value), file.parent / value):
        if _is_file(named) and not named.resolve().is_relative_to(folder.resolve()):
            raise ModelError(
                f"{file}: {key} names {value!r:.80}, which is no file of its folder; leave it out"
            )


def _is_file(path: Path) -> bool:
    """A name that no file can have, or that is too long, names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
