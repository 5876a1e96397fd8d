"""A folder with an adapter of peft, checked before peft sees it, and put on its base model, unmerged.

The folder holds adapter_config.json and adapter_model.safetensors, as `PeftModel.save_pretrained` writes them. It may
come from a stranger. The file names the modules that are adapted, so that no pattern of the configuration is run. LoRA
(with DoRA and rsLoRA) and IA3 are taken; fields that would run other code or change the base must be as peft has them
by default. No pickle is read, and nothing is fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from headwater.lens.errors import ModelError, first_line
from headwater.lens.files import parse_json, read_text
from headwater.lens.loading.folder import CONFIG, refuse_links

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BYTES = 2**20
PREFIX = "base_model.model."
PART = re.compile(r"\.(?:lora_|ia3_)")  # what follows the path of an adapted module in the name of a tensor
NAME = re.compile(r"[\w.]{1,200}")
# fields that a configuration may choose: those that the file decides, and those that decide numbers
KINDS = {
    "LORA": (
        "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias",
    ),
    "IA3": ("fan_in_fan_out",),
}  # fmt: skip
# what the file itself tells, what names things, and what acts in training alone
TOLD = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "modules_to_save", "feedforward_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "init_ia3_weights", "megatron_core", "qalora_group_size", "runtime_config",
    "auto_mapping", "ensure_weight_tying",
}  # fmt: skip
# ways of initialising LoRA that leave the base as it is; PiSSA, OLoRA and others take a part out of its weights
INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (path / ADAPTER).is_file() and not (path / CONFIG).exists()


def base_of(path: Path) -> Path:
    """The folder of the base model that an adapter names, absolute or beside it; ModelError if there is none."""
    named = _raw(path).get("base_model_name_or_path")
    if isinstance(named, str) and named:
        # a name that is too long, or of a home that nobody has, is no folder
        with contextlib.suppress(OSError, RuntimeError):
            for folder in (path / named, Path(named).expanduser()):
                if folder.is_dir():
                    return folder.resolve()
    of = f"of {named!r:.100}, which is no folder here" if named else "that names no base model"
    raise ModelError(f"{path} is an adapter {of}; give load(…, base=folder) with that model")


def put_on(hf: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The base model with the adapter of the folder on it, active and not merged."""
    try:
        import peft
    except ImportError:
        raise ModelError(
            f"{path} is an adapter, which takes peft to be opened; pip install 'headwater[adapters]'"
        ) from None
    raw, state = _raw(path), _tensors(path)
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ModelError(
            f"{path} is an adapter of the kind {kind!r:.40}; of folders LoRA and IA3 are read: open it with peft and "
            "give load() the PeftModel"
        )
    config = _config(path, raw, state, peft.LoraConfig if kind == "LORA" else peft.IA3Config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks transformers, which means nothing here
        try:
            adapted = peft.get_peft_model(hf, config)
            report = peft.set_peft_model_state_dict(adapted, state)
        except Exception as error:  # of whatever peft makes of tensors and modules that are not each other's
            told = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"the adapter in {path} does not fit its base model: {type(error).__name__}: "
                f"{' '.join(told[:2]):.300}"
            ) from None
    missing = [key for key in report.missing_keys if PART.search(key) or ".modules_to_save." in key]
    if faults := [*report.unexpected_keys, *missing]:
        raise ModelError(f"the adapter in {path} does not fit its base model, first at {faults[0]}")
    return adapted.get_base_model()


def _raw(path: Path) -> dict[str, Any]:
    text = read_text(path / ADAPTER, BYTES, ModelError, "an adapter's config is smaller")
    raw = parse_json(text, str(path / ADAPTER), ModelError)
    if not isinstance(raw, dict):
        raise ModelError(f"{path / ADAPTER} must hold a JSON object; got {type(raw).__name__}")
    return raw


def _tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{path} has no {WEIGHTS}; adapters of other formats (pickles) are not read")
    refuse_links(path)
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: {first_line(error)}") from None
    for name, tensor in found.items():
        if not name.startswith(PREFIX) or not NAME.fullmatch(name):
            raise ModelError(f"{file}: {name!r:.80} is no name of an adapter's tensor")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{file}: {name} holds NaN or infinite values")
    return found


def _config(path: Path, raw: dict[str, Any], state: dict[str, Tensor], kind: Any) -> Any:
    """The configuration, with the modules that the file names."""
    default = kind()
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    chosen: dict[str, Any] = {}
    for name, value in raw.items():
        if name in KINDS[raw["peft_type"]]:
            chosen[name] = _checked(path, name, value, known[name], state)
        elif name == "init_lora_weights" and value in INITS:
            continue
        elif name not in TOLD and value not in (None, False, {}, [], known.get(name)):
            raise ModelError(
                f"{path / ADAPTER}: {name} is not taken; open it with peft and give load() the PeftModel"
            )
    modules = [name.removeprefix(PREFIX) for name in state]
    adapted = {PART.split(name)[0] for name in modules if PART.search(name)}
    if not adapted:
        raise ModelError(f"{path / WEIGHTS} holds no tensors of an adapter")
    chosen["target_modules"] = sorted(adapted)
    if saved := sorted({name.rpartition(".")[0] for name in modules if not PART.search(name)}):
        chosen["modules_to_save"] = saved
    if raw["peft_type"] == "IA3":
        ends = raw.get("feedforward_modules") or []
        if not isinstance(ends, list) or not all(isinstance(end, str) for end in ends):
            raise ModelError(
                f"{path / ADAPTER}: feedforward_modules must be a list of names; got {ends!r:.80}"
            )
        chosen["feedforward_modules"] = [name for name in adapted if any(name.endswith(end) for end in ends)]
    return kind(**chosen)


def _checked(path: Path, name: str, value: Any, default: Any, state: dict[str, Tensor]) -> Any:
    largest = max((max(tensor.shape) for tensor in state.values() if tensor.dim()), default=1)
    if isinstance(default, dict):
        good = isinstance(value, dict) and all(NAME.fullmatch(key) for key in value)
        good = good and all(
            _number(each, largest if name == "rank_pattern" else 2**20) for each in value.values()
        )
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    else:
        good = _number(value, largest if name == "r" else 2**20) and (name != "r" or isinstance(value, int))
    if not good:
        raise ModelError(f"{path / ADAPTER}: {name} is {value!r:.80}, which the tensors do not bear out")
    return value


def _number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
