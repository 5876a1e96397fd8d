"""The small trained models that ship with Headwater, each with its weights, training script, metrics and licence.

`digests.json` holds the sha256 of every file that decides their numbers. `python -m headwater.lens.models.embedded`
writes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from headwater.lens.errors import ModelError

DIGESTS = "digests.json"
PIPELINE = "model_index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
DECIDING = (
    "*.safetensors", "config.json", "generation_config.json", "tokenizer*.json", PIPELINE,
    "scheduler_config.json",
)  # fmt: skip
FOLDER = Path(__file__).resolve().parents[2] / "data" / "models"


@cache
def embedded() -> dict[str, dict[str, Any]]:
    """{name: {"path", "description", "metrics", "reads"}} of every embedded model; it reads "text",
    "pictures", or "prompts" of what it draws."""
    found = {}
    for folder in sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []:
        whole = (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
        if not whole and not (folder / PIPELINE).is_file():
            continue
        found[folder.name] = {**about_folder(folder), "reads": _reads(folder)}
    return found


def about_folder(folder: Path) -> dict[str, Any]:
    """What a model's folder says of it: the path, the first sentence of its page, its metrics."""
    metrics = folder / "metrics.json"
    readme = folder / "README.md"
    paragraphs = readme.read_text(encoding="utf-8").split("\n\n") if readme.is_file() else []
    opening = next((each for each in paragraphs if each.strip() and not each.startswith("#")), "")
    return {
        "path": folder,
        "description": re.split(r"(?<=\.) ", " ".join(opening.split()))[0],
        "metrics": json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {},
    }


def _reads(folder: Path) -> str:
    if (folder / PIPELINE).is_file():
        return "prompts"
    return "pictures" if any((folder / name).is_file() for name in PROCESSORS) else "text"


def check_embedded(name: str) -> None:
    """ModelError where a file of an embedded model is not the one that was shipped."""
    shipped = json.loads((FOLDER / DIGESTS).read_text(encoding="utf-8")).get(name)
    found = digests(FOLDER / name)
    if differing := sorted(
        file for file in {*found, *(shipped or {})} if found.get(file) != (shipped or {}).get(file)
    ):
        raise ModelError(
            f"the embedded model {name} is not the one that was shipped ({differing[0]} was changed); install "
            "Headwater again, or copy the folder elsewhere and load it by its path"
        )


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a model's folder, or in one of its parts, that decides its numbers."""
    files = sorted(file for pattern in DECIDING for file in folder.rglob(pattern))
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


if __name__ == "__main__":
    folders = [each for each in sorted(FOLDER.iterdir()) if any(each.rglob("*.safetensors"))]
    written = {folder.name: digests(folder) for folder in folders}
    (FOLDER / DIGESTS).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
