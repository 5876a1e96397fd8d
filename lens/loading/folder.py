"""A model's folder, checked before transformers sees it.

A folder is data from strangers. Its weights are the safetensors files that lie in it: no pickle by whatever name, no
file from elsewhere, no adapter that would change them. Its config.json is strict JSON with bounded numbers; it can not
name other files, nor whose code computes the attention. The model is built without memory first, and held to the size
of the weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from headwater.lens.errors import HeadwaterError, ModelError
from headwater.lens.examples.settings_files import check_sizes
from headwater.lens.files import parse_json, read_text

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CONFIG_BYTES, INDEX_BYTES = 2**20, 2**26
TEMPLATES = "additional_chat_templates"
NOT_READ = (
    ".md",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".svg",
    ".pdf",
)  # by nobody: such a file may be a link to elsewhere
LONGEST_REASON = 300  # characters of a message from a loader
FEW_MODULES, MODULES_EACH = 2000, 50  # of a model: some, and so many for each tensor that is stored
BUFFER_BYTES = 2**28  # tables that a model computes for itself, where its weights are small
REFUSED_FILES = {
    "adapter_config.json": "an adapter, which changes the weights; put it in a folder of its own and give "
    "load(that, base=this), or merge it with peft (merge_and_unload)",
    "spk_dict.pt": "a pickle, which can run code; move it elsewhere",
}
QUANTISED = ("quantization_config", "compression_config")
REFUSED_FIELDS = ("configuration_files", "checkpoint_path")  # further files, by any path
# Transformers fetches native code for an attention that is named like a hub id.
DROPPED_FIELDS = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?|trust_remote_code")
LIMITS = {
    "num_hidden_layers": 2048, "encoder_layers": 2048, "decoder_layers": 2048, "num_decoder_layers": 2048,
    "num_attention_heads": 4096, "hidden_size": 2**18, "vocab_size": 2**24,
}  # fmt: skip
# Transformers makes lists as long as these before anything else can be checked.
COUNTS, MOST_COUNT = re.compile(r"label|layer|depth|block|head|expert|stage"), 2**18
UNBOUNDED = re.compile(r"theta|base|seed|length|rate|scale")  # numbers that take no memory
MOST = 2**25


@dataclass(frozen=True)
class Folder:
    """A folder that was checked: its configuration, the class it is of, and its weight files."""

    path: Path
    config: Any
    kind: Any
    weights: list[Path]


def check(path: Path, fewest_layers: int = 1) -> Folder:
    """What a folder holds; ModelError with the reason for one that can not be trusted or read."""
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder; a model is a folder with {CONFIG} and {WEIGHTS}")
    for name, what in REFUSED_FILES.items():
        if (path / name).exists():
            raise ModelError(f"{path} holds {name}: {what}")
    refuse_links(path)
    check_sizes(path)
    config = _config(path, fewest_layers)
    weights = _weights(path)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    kind = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
    _check_size(config, kind, weights)
    return Folder(path, config, kind, weights)


def built(folder: Folder, dtype: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its weights, and transformers' report of missing and unexpected tensors."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # transformers draws it without a terminal too
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_not_interrupted)
    try:
        return folder.kind.from_pretrained(
            folder.path, config=folder.config, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, dtype=dtype or torch.float32, attn_implementation="eager",
        )  # fmt: skip
    finally:
        log.removeFilter(_not_interrupted)
        if bars:
            transformers_logging.enable_progress_bar()


def _not_interrupted(_: logging.LogRecord) -> bool:
    """Ctrl-C before weights are tied leaves them missing, which transformers reports in a `finally`."""
    return not isinstance(sys.exception(), KeyboardInterrupt)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever a broken file makes the loaders raise, the user gets one line."""
    try:
        yield
    except HeadwaterError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        raise ModelError(f"{what}: {type(error).__name__}: {told[:LONGEST_REASON]}") from None


def _config(folder: Path, fewest_layers: int) -> Any:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG}, so it is not a model folder")
    text = read_text(path, CONFIG_BYTES, ModelError, "a model's config is smaller")
    raw = parse_json(
        text, str(path), ModelError, finite=False
    )  # limits of state space models can be Infinity
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must hold a JSON object; got {type(raw).__name__}")
    architectures = raw.get("architectures")
    if not isinstance(raw.get("model_type", ""), str) or not (
        architectures is None
        or (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures))
    ):
        raise ModelError(
            f"{path}: model_type is a text and architectures a list of texts; got {architectures!r:.80}"
        )
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ModelError(f"{folder} needs code of its own (auto_map in {CONFIG}), which Headwater never runs")
    # transformers reads a copy, which holds nothing but what was checked
    with one_line(f"{path} can not be read"), tempfile.TemporaryDirectory(prefix="headwater-") as copy:
        (Path(copy) / CONFIG).write_text(json.dumps(bounded(raw, path)), encoding="utf-8")
        config = AutoConfig.from_pretrained(
            copy, trust_remote_code=False, local_files_only=True, attn_implementation="eager"
        )
        config.name_or_path = str(folder)
        _check_numbers(config, path, fewest_layers)
    return config


def bounded(value: Any, path: Path, name: str = "") -> Any:
    """The same data without the fields that are dropped; files and numbers that are refused raise."""
    if isinstance(value, dict):
        for field in REFUSED_FIELDS:
            if field in value:
                raise ModelError(f"{path}: {field} names further files, which are not read; leave it out")
        _refuse_fetching(value, path)
        if value.get("transformers_weights") not in (None, WEIGHTS, INDEX):
            raise ModelError(f"{path}: transformers_weights is not {WEIGHTS}; give the weights that name")
        return {k: bounded(v, path, k) for k, v in value.items() if not DROPPED_FIELDS.fullmatch(k)}
    if isinstance(value, list):
        return [bounded(item, path, name) for item in value]
    if isinstance(value, int) and not UNBOUNDED.search(name):
        most = MOST_COUNT if COUNTS.search(name) and "vocab" not in name else MOST
        if abs(value) > most:
            raise ModelError(f"{path}: {name} is {value}; it may be at most {most}")
    return value


def _refuse_fetching(value: dict[str, Any], path: Path) -> None:
    """Refuse fields for which transformers looks on a hub: kernels of a quantisation, weights of a backbone."""
    if (named := value.get("backbone")) is not None:
        raise ModelError(
            f"{path}: backbone is {named!r:.80}, which is looked up elsewhere; give a backbone_config"
        )
    if value.get("model_type") in ("timm_backbone", "timm_wrapper"):
        raise ModelError(
            f"{path}: {value['model_type']} is code of the package timm, which Headwater does not run"
        )
    for field in QUANTISED:
        if (given := value.get(field)) is None:
            continue
        method = given.get("quant_method") if isinstance(given, dict) else given
        if (
            isinstance(given, dict)
            and method is None
            and (given.get("load_in_8bit") or given.get("load_in_4bit"))
        ):
            method = "bitsandbytes"
        if method != "bitsandbytes":
            raise ModelError(
                f"{path}: {field} asks for {method!r:.80}, whose kernels are fetched or run from elsewhere; Headwater "
                "opens weights of bitsandbytes, and others after they are dequantised and saved"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                f"{path}: these weights need bitsandbytes, which is not installed (pip install bitsandbytes)"
            )


def _check_numbers(config: Any, path: Path, fewest_layers: int) -> None:
    text = config.get_text_config()
    towers = [config, text, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for tower in towers:
        for field, most in LIMITS.items():
            value = getattr(tower, field, 1)
            fewest = fewest_layers if field.endswith("layers") else 1
            if not isinstance(value, int) or not fewest <= value <= most:
                raise ModelError(
                    f"{path}: {field} is {value!r}; it must be a whole number from {fewest} to {most}"
                )
    heads = getattr(text, "num_attention_heads", 1)
    kv = getattr(text, "num_key_value_heads", None)
    if kv is not None and (not isinstance(kv, int) or kv < 1 or heads % kv):
        raise ModelError(
            f"{path}: num_key_value_heads is {kv!r}, which does not divide num_attention_heads {heads}"
        )
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ModelError(f"{path}: max_position_embeddings is {limit!r}; it must be at least 1")


def _weights(folder: Path) -> list[Path]:
    """The weight files; those that an index names must be among them."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is not a plain file; weights are safetensors files")
    if not files:
        pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern)]
        if pickles:
            raise ModelError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code; convert them to safetensors "
                "with model.save_pretrained(folder)"
            )
        raise ModelError(f"{folder} has no *.safetensors weights")
    index = folder / INDEX
    if index.exists():
        content = parse_json(read_text(index, INDEX_BYTES, ModelError), str(index), ModelError)
        named = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(named, dict):
            raise ModelError(f"{index} has no weight_map, which says where each weight lies")
        for name in named.values():
            if name not in [file.name for file in files]:
                raise ModelError(f"{index} names {name!r:.80}, which is no *.safetensors file of the folder")
    return files


def refuse_links(folder: Path) -> None:
    """Refuse links that lead out of the folder, also in the folders within it: tokenizers read files by names of their
    own, with any ending. The hub's cache keeps its files so."""
    within = [each for each in folder.glob("*") if each.is_dir() and not each.is_symlink()]
    places = (folder, *within, *(each / TEMPLATES for each in within))
    for place in places:
        for each in (place, *place.glob("*")):
            inside = each == folder or each.resolve().is_relative_to(folder.resolve())
            if not inside and each.suffix not in NOT_READ and not in_hub_cache(each):
                raise ModelError(f"{each} is a link to a file outside of the folder; copy the file")


def in_hub_cache(file: Path) -> bool:
    """The hub's cache keeps the files of a folder in `snapshots` as links into the folder `blobs` beside that."""
    blobs = file.resolve().parent
    return blobs.name == "blobs" and blobs.with_name("snapshots") in file.absolute().parents


def _check_size(config: Any, kind: Any, weights: list[Path]) -> None:
    """Build the shapes alone and compare them with what the files can hold, before any memory is taken."""
    stored = sum(file.stat().st_size for file in weights)
    few = _few_modules(FEW_MODULES + MODULES_EACH * _tensors(weights))
    with (
        one_line("the config describes no model that can be built"),
        torch.device("meta"),
        no_init_weights(),
        few,
    ):
        shapes = kind._from_config(config) if kind is not AutoModel else AutoModel.from_config(config)
    numbers = sum(p.numel() for p in shapes.parameters())
    # one bit a number is less than any format in use; a config that claims more than that lies
    if numbers > stored * 8:
        raise ModelError(
            f"the config describes {numbers:,} numbers but the weight files have only {stored:,} bytes"
        )
    computed = sum(b.numel() * b.element_size() for b in shapes.buffers())
    if computed > stored * 8 + BUFFER_BYTES:
        raise ModelError(
            f"the config describes tables of {computed:,} bytes for weight files of {stored:,} bytes; is its number "
            "of positions right?"
        )


def _tensors(files: list[Path]) -> int:
    """How many tensors there are in weight files."""
    count = 0
    for file in files:
        with one_line(f"{file} can not be read"), safe_open(file, framework="pt") as opened:
            count += len(opened.keys())
    return count


@contextlib.contextmanager
def _few_modules(most: int) -> Iterator[None]:
    """Stop where a model gets more modules than that: a config names millions of layers in a few bytes, and each takes
    time and memory also where its weights take none."""
    count, here = 0, threading.get_ident()

    def counted(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == here
        if count > most:
            raise ModelError(
                f"the config describes more than {most:,} modules, which the tensors in the weight files do not fill"
            )

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
