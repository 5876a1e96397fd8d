"""`load`: open a model by embedded name, folder or hub id, or one in memory, and check that it is read rightly.

Model folders are data from strangers: safetensors alone, no remote code, sizes checked before anything is built, no
missing or extra tensors (transformers would fill the missing ones with random numbers), all weights finite. What is
loaded is then hooked and compared with itself untouched (opening.py).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from headwater.lens.errors import HeadwaterError, ModelError, nearest
from headwater.lens.loading.opening import open_model
from headwater.lens.model import HookedModel
from headwater.lens.models import declared_rules
from headwater.lens.models.embedded import embedded
from headwater.lens.transformer_lens.bridge import is_bridged, tokenizer_of, unbridged

LIMITS = {
    "num_hidden_layers": 2048, "encoder_layers": 2048, "decoder_layers": 2048, "num_decoder_layers": 2048,
    "num_attention_heads": 4096, "hidden_size": 2**18, "vocab_size": 2**24,
}  # fmt: skip
CONFIG_BYTES = 2**20
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]
HUB_SECONDS = 5  # for the hub to answer; a download then takes what it takes
NEAR = 0.6  # a name this like an embedded one is taken for a slip


def load(
    source: str | os.PathLike[str] | nn.Module, tokenizer: Any = None, *, dtype: Any = None
) -> HookedModel:
    """Open a model.

    `source` is an embedded name (`headwater models` lists them), a local folder, a hub id, or a transformers model in
    memory, which from then on runs its attention through Headwater (its weights are never touched) and in eval mode; or
    a TransformerBridge, which stays as it is: the model inside is opened beside it, on the same weights.
    `tokenizer` may be left out; then prompts are token ids. `dtype` is float32 unless given, for models read from disk.
    Raises ModelError with the reason for anything that can not be found, trusted, or read exactly.
    """
    if is_bridged(source):
        hf = unbridged(source)
        known_tokenizer = tokenizer_of(source) if tokenizer is None else tokenizer
        return open_model(hf, known_tokenizer, type(hf).__name__, _weights_digest(hf))
    if isinstance(source, PreTrainedModel):
        return open_model(source, tokenizer, type(source).__name__, _weights_digest(source))
    if isinstance(getattr(source, "_orig_mod", None), PreTrainedModel):
        raise ModelError(
            f"{type(source._orig_mod).__name__} is wrapped by torch.compile; load() the model itself"  # type: ignore[union-attr]
        )
    if isinstance(source, nn.Module):
        raise ModelError(
            f"{type(source).__name__} is not a transformers model; load() takes one, a folder, or a name"
        )
    name = os.fspath(source)
    if not isinstance(name, str) or not name.strip():
        raise ModelError("the name of the model is empty; `headwater models` lists the embedded ones")
    known = embedded()
    if name in known:
        return _from_folder(known[name]["path"], tokenizer, name, dtype)
    path = Path(name).expanduser()
    if path.exists():
        return _from_folder(path, tokenizer, path.resolve().name, dtype)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}")
    return _from_hub(name, tokenizer, dtype)


def _from_hub(name: str, tokenizer: Any, dtype: Any) -> HookedModel:
    """A hub id: fetched by huggingface_hub into its cache, safetensors and text files alone."""
    from huggingface_hub import HfApi, constants, snapshot_download

    known = embedded()
    near = "/" not in name and bool(difflib.get_close_matches(name, known, n=1, cutoff=NEAR))
    folder = _cached(name) if near or constants.HF_HUB_OFFLINE else None
    why = "not looked for on the hub, so near is it to another" if near else "HF_HUB_OFFLINE is set"
    try:
        if folder is None and not near and not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(
                name, timeout=HUB_SECONDS
            )  # the download itself would wait far longer for an answer
            folder = snapshot_download(name, allow_patterns=WANTED)
    except Exception as error:  # the hub client raises many kinds; each means that the model is not to be had
        folder, why = _cached(name), type(error).__name__
    if folder is None:
        hint = f"; {nearest(name, known)}" if "/" not in name else ""
        raise ModelError(
            f"no embedded model, folder or reachable hub model is called {name!r} ({why}){hint}; without a network "
            "give a local folder"
        )
    return _from_folder(Path(folder), tokenizer, name, dtype)


def _cached(name: str) -> Path | None:
    """The snapshot of a hub id that lies in the cache already."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except Exception:  # not there, or not a valid id: both mean that it is not cached
        return None


def _from_folder(folder: Path, tokenizer: Any, name: str, dtype: Any) -> HookedModel:
    config = _read_config(folder)
    weights = _weight_files(folder)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    kind = (
        architecture
        if isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)
        else AutoModel
    )
    _check_size(config, kind, weights)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it draws its own, also where nobody is at a terminal
    try:
        hf, report = kind.from_pretrained(  # type: ignore[misc]
            folder, config=config, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, dtype=dtype or torch.float32, attn_implementation="eager",
        )  # fmt: skip
    except HeadwaterError:
        raise
    except Exception as error:  # whatever a broken file makes the loaders raise, the user gets one line
        raise ModelError(
            f"{folder} can not be loaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    _refuse_incomplete(folder, hf, report)
    if tokenizer is None:
        tokenizer = _tokenizer(folder)
    model = open_model(hf, tokenizer, name, _files_digest(weights))
    declared_rules.attach(
        model, folder
    )  # after the comparison with the untouched model, which does not know them
    return model


def _read_config(folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder; a model is a folder with config.json and model.safetensors"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder")
    if path.stat().st_size > CONFIG_BYTES:
        raise ModelError(
            f"{path} has {path.stat().st_size} bytes; a model's config has at most {CONFIG_BYTES}"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must hold a JSON object; got {type(raw).__name__}")
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{folder} needs code of its own (auto_map in config.json), which Headwater never runs"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{path} can not be read: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    _check_numbers(config, path)
    return config


def _check_numbers(config: Any, path: Path) -> None:
    text = config.get_text_config()
    towers = [config, text, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for tower in towers:
        for field, most in LIMITS.items():
            value = getattr(tower, field, 1)
            if not isinstance(value, int) or not 0 < value <= most:
                raise ModelError(f"{path}: {field} is {value!r}; it must be a whole number from 1 to {most}")
    heads = getattr(text, "num_attention_heads", 1)
    kv = getattr(text, "num_key_value_heads", None)
    if kv is not None and (not isinstance(kv, int) or kv < 1 or heads % kv):
        raise ModelError(
            f"{path}: num_key_value_heads is {kv!r}, which does not divide num_attention_heads {heads}"
        )
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ModelError(f"{path}: max_position_embeddings is {limit!r}; it must be at least 1")


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    outside = [
        f
        for f in files
        if f.is_symlink() and not _in_hub_cache(f) and folder.resolve() not in f.resolve().parents
    ]
    if outside:
        raise ModelError(f"{outside[0]} is a link to a file outside of the model folder; copy the file")
    if not files:
        pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern)]
        if pickles:
            raise ModelError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code; convert them to safetensors "
                "with model.save_pretrained(folder)"
            )
        raise ModelError(f"{folder} has no *.safetensors weights")
    return files


def _in_hub_cache(file: Path) -> bool:
    """The hub's cache keeps the files of a snapshot as links into a folder `blobs` beside it."""
    return file.resolve().parent.name == "blobs" and file.resolve().parent.parent in file.absolute().parents


def _check_size(config: Any, kind: Any, weights: list[Path]) -> None:
    """Build the shapes alone and compare them with what the files can hold, before any memory is taken."""
    try:
        with torch.device("meta"):
            shapes = kind._from_config(config) if kind is not AutoModel else AutoModel.from_config(config)
    except Exception as error:
        raise ModelError(
            f"the config describes no model that can be built: {str(error).splitlines()[0]}"
        ) from None
    numbers = sum(p.numel() for p in shapes.parameters())
    stored = sum(f.stat().st_size for f in weights)
    # one bit a number is less than any format in use; a config that claims more than that lies
    if numbers > stored * 8:
        raise ModelError(
            f"the config describes {numbers:,} numbers but the weight files have only {stored:,} bytes"
        )


def _refuse_incomplete(folder: Path, hf: Any, report: dict[str, Any]) -> None:
    missing = sorted(map(str, report.get("missing_keys", ())))
    unexpected = sorted(map(str, report.get("unexpected_keys", ())))
    wrong = sorted(
        str(item[0] if isinstance(item, tuple) else item) for item in report.get("mismatched_keys", ())
    )
    for what, names in (
        ("lack", missing),
        ("have shapes that do not fit", wrong),
        ("have unknown", unexpected),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the weights in {folder} {what} {', '.join(names[:3])}{more} for {type(hf).__name__}; the file does "
                "not belong to this config"
            )


def _tokenizer(folder: Path) -> Any:
    if not any(
        (folder / n).is_file()
        for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {folder} can not be loaded: {str(error).splitlines()[0]}"
        ) from None


def _files_digest(files: list[Path]) -> str:
    """sha256 over the weight files, so that a record says exactly which weights it is of."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest() if len(files) > 1 else b"")
            if len(files) == 1:
                return "sha256:" + hashlib.file_digest(handle, "sha256").hexdigest()
    return "sha256:" + digest.hexdigest()


def _weights_digest(hf: Any) -> str:
    """A short digest of weights in memory: of each tensor's shape and its first and last numbers."""
    digest = hashlib.sha256()
    for key, weight in sorted(hf.state_dict().items()):
        flat = weight.detach().reshape(-1) if not weight.is_meta else torch.empty(0)  # refused by the check
        ends = torch.cat([flat[:64], flat[-64:]]).float().cpu().numpy().tobytes()
        digest.update(f"{key}{tuple(weight.shape)}".encode() + ends)
    return "ends-sha256:" + digest.hexdigest()[:16]
