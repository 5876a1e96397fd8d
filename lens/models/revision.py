"""`Revision`: a digest of everything in a model that decides its numbers.

It is a sha256 over every byte of every parameter and buffer, the class and plain attributes of every module (scales,
windows, adapters that are on), functions put on a module (hooks, a `forward` of its own), the rules that a folder
declares, and the configuration without what only names things. The precision is part of it: the same file opened in
float32 and in bfloat16 gives other numbers. Models from a folder and from memory are treated alike.

Cost: one pass over the weights when it is first asked for, on two threads, about half a second per GB on a current
processor. Later calls hash what is no weight, and only tensors that torch counts as changed since or of which a sample
of numbers differs (lens/weight_samples.py): torch does not count what is written through `.data` or numpy.
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from functools import partial
from operator import is_, itemgetter
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.lens.weight_samples import Samples

PREFIX = "model-sha256:"
PLAIN = (bool, int, float, str, type(None))
# attributes that name things, or that change from run to run without changing a number
NAMES = {
    "training", "name_or_path", "warnings_issued", "layer_idx", "layer_id", "supports_gradient_checkpointing",
    "gradient_checkpointing", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method",
    "dtype", "max_seq_len_cached", "config", "generation_config", "all_tied_weights_keys", "loss_type", "model_tags",
}  # fmt: skip
# their functions on a module run, keep or trace it; what they change is in tensors and attributes
OWN = {"headwater", "transformers", "torch", "accelerate", "peft", "bitsandbytes", "functools"}
PASSED_OVER = NAMES | vars(nn.Module()).keys()
# fields of a configuration that name things, choose what is returned, or say how the model was saved
NAMING = {
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "attn_implementation",
    "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "id2label", "label2id", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "task_specific_params", "problem_type", "torchscript", "auto_map",
    "quantization_config",
}  # fmt: skip


class Revision:
    """The digest of one model as it is `now`."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.files: tuple[Path, ...] = ()  # the weight files, where it came from a folder
        self._known: dict[str, tuple[_State, str]] = {}
        self._samples: Samples | None = None
        self._lines: dict[str, _Line] = {}
        # the buffers that a run computes anew for its length, as they are now
        self._moving = {
            name: _of_tensor(buffer)
            for name, buffer in hf.named_buffers()
            if _moves(hf.get_submodule(name.rpartition(".")[0]))
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": {}, "_samples": None, "_lines": {}}  # a copy has tensors of its own

    def now(self) -> str:
        """`model-sha256:` and 64 digits."""
        walked = _walked(self.hf)
        weights = sorted(_stored(walked), key=itemgetter(0))
        samples = Samples.of(weights)
        moved = samples.other_than(self._samples)
        known = self._known
        stale = [
            (name, value) for name, value in weights
            if name in moved or name not in known or not known[name][0].still(value)
        ]  # fmt: skip
        if stale:
            with ThreadPoolExecutor(2) as pool:
                found = pool.map(_of_value, (value for _, value in stale))
                for (name, value), digest in zip(stale, found, strict=True):
                    known[name] = (_State.of(value), digest)
        self._samples = samples
        kept = dict(weights)
        written = json.JSONEncoder(sort_keys=True, default=repr).encode
        told = [written(_plain(self.hf.config.to_dict(), NAMING)).encode() + b"\n"]
        first: dict[nn.Module, str] = {}  # the first path of each module
        for path, module in walked:
            first.setdefault(module, path)
        lines: dict[str, _Line] = {}
        for module, path in sorted(first.items(), key=itemgetter(1)):
            line = self._lines.get(path)
            if line is None or not line.still(module):
                line = _Line.of(module, written((path, *_told_of(module))).encode() + b"\n")
            lines[path] = line
            told.append(line.written)
        self._lines = lines
        for name, buffer in sorted(_buffers(first), key=itemgetter(0)):
            if name not in kept:
                told.append(f"{name} {self._moving.get(name) or _of_tensor(buffer)}\n".encode())
        told += [f"{name} {known[name][1]}\n".encode() for name, _ in weights]
        return PREFIX + hashlib.sha256(b"".join(told)).hexdigest()

    def matches(self, told: str) -> bool:
        """Whether a file means this model by its revision; before there was `PREFIX`, it was of the weight files."""
        return told == (self.now() if told.startswith(PREFIX) else of_files(self.files))


class _State(NamedTuple):
    """What changes when torch writes to a tensor or another one takes its place; nothing is known of other values."""

    tensor: weakref.ref[Tensor] | None
    place: int
    version: int

    @classmethod
    def of(cls, value: Any) -> _State:
        if not isinstance(value, Tensor):
            return cls(None, 0, 0)
        return cls(weakref.ref(value), value.data_ptr(), 0 if value.is_inference() else value._version)

    def still(self, value: Any) -> bool:
        if self.tensor is None or self.tensor() is not value:
            return False
        version = 0 if value.is_inference() else value._version
        return self.version == version and self.place == value.data_ptr()


def _moves(module: Any) -> bool:
    """Whether a module computes its rotary table anew for the length of a text."""
    kinds = getattr(module, "rope_type", None)
    return bool({"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]))


def stored(hf: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every value that a model stores to compute with, by name."""
    return _stored(_walked(hf))


def _walked(hf: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module by its path, in the order of `named_modules`, which takes six times as long; one that stands in two
    places comes twice."""
    found, waiting = [], [("", hf)]
    while waiting:
        path, module = waiting.pop()
        found.append((path, module))
        if module._modules:
            where = f"{path}." if path else ""
            inner = [(where + name, each) for name, each in module._modules.items() if each is not None]
            waiting += reversed(inner)
    return found


def _stored(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """Every value that a model stores to compute with, by name; what torch's own quantisation packs is no tensor.

    `state_dict` is not asked: bitsandbytes unpacks 4 bit weights for it on a CPU and leaves their scales in another
    order, so that the model gives other numbers from then on.
    """
    packs = "bitsandbytes" in sys.modules
    for path, module in modules:
        where = f"{path}." if path else ""
        known = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in known:
                yield where + name, tensor
                if packs:
                    yield from _beside(f"{where}{name}", tensor)
        if packs:
            yield from _beside(path, module)
        if type(module).__module__.startswith("torch.ao."):
            packed: dict[str, Any] = {}
            module._save_to_state_dict(packed, where, True)
            yield from (
                (name, value) for name, value in packed.items() if not isinstance(value, nn.Parameter)
            )


def _beside(where: str, holder: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that bitsandbytes keeps as attributes of its modules, its parameters and their states."""
    for name, value in vars(holder).items():
        if _of_bitsandbytes(holder) and type(value) is Tensor:
            yield f"{where}.{name}", value
        elif _of_bitsandbytes(value) and not isinstance(value, nn.Module | nn.Parameter):
            yield from _beside(f"{where}.{name}", value)


def _of_bitsandbytes(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "bitsandbytes"


def of_files(files: Sequence[Path]) -> str:
    """The sha256 of one weight file; of several, the sha256 of their digests."""
    found = []
    for file in files:
        with file.open("rb") as handle:
            found.append(hashlib.file_digest(handle, "sha256"))
    whole = found[0] if len(found) == 1 else hashlib.sha256(b"".join(each.digest() for each in found))
    return "sha256:" + whole.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """The digest of everything that decides which ids a text becomes; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    whole = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    told = {n: getattr(tokenizer, n, None) for n in ("chat_template", "add_bos_token", "add_eos_token")}
    rest = json.dumps(
        [type(tokenizer).__name__, told, getattr(tokenizer, "special_tokens_map", None)], default=repr
    )
    return "sha256:" + hashlib.sha256(f"{whole}\n{rest}".encode()).hexdigest()


def of_processor(processor: Any) -> str:
    """The digest of the settings with which pictures and sounds become numbers; empty where there are none."""
    inside = [
        getattr(processor, name, None) for name in ("image_processor", "feature_extractor", "video_processor")
    ]
    makers = [
        each for each in (*inside, processor)
        if each is not None and hasattr(each, "to_dict") and not hasattr(each, "decode")
    ]  # fmt: skip
    if not makers:
        return ""
    told = [(type(each).__name__, each.to_dict()) for each in makers]
    return "sha256:" + hashlib.sha256(json.dumps(told, sort_keys=True, default=repr).encode()).hexdigest()


def _of_value(value: Any) -> str:
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, tuple | list):  # the packed weights of torch's own quantisation
        return hashlib.sha256("".join(map(_of_value, value)).encode()).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _of_tensor(tensor: Tensor) -> str:
    tensor = tensor.detach()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.numel():
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


class _Line(NamedTuple):
    """What was `written` of a module, and what decides it; nothing is known where an attribute may change in place."""

    module: weakref.ref[nn.Module]
    kind: type
    names: tuple[str, ...]
    told: tuple[str, ...]  # those of them that were told of
    values: tuple[Any, ...]
    written: bytes

    @classmethod
    def of(cls, module: nn.Module, written: bytes) -> _Line:
        names = tuple(vars(module))
        told = tuple(name for name in names if name not in PASSED_OVER)
        values = tuple(vars(module)[name] for name in told)
        hooked = module._forward_pre_hooks or module._forward_hooks
        if hooked or not all(isinstance(value, PLAIN) for value in values):
            names = told = values = ()
        return cls(weakref.ref(module), type(module), names, told, values, written)

    def still(self, module: nn.Module) -> bool:
        """Whether the same would be written now."""
        has = vars(module)
        if self.module() is not module or self.kind is not type(module) or self.names != tuple(has):
            return False
        unhooked = not module._forward_pre_hooks and not module._forward_hooks
        return unhooked and all(map(is_, map(has.__getitem__, self.told), self.values))


def _buffers(paths: Mapping[nn.Module, str]) -> Iterator[tuple[str, Tensor]]:
    """Every buffer, once, by the path of its first module."""
    seen: set[int] = set()
    for module, path in paths.items():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{path}.{name}" if path else name, buffer


def _told_of(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The class and plain attributes of a module."""
    plain = {}
    for name in vars(module).keys() - PASSED_OVER:
        # of a whole model, names with an underscore are plans for loading and for many devices
        if name.startswith("_is_hf") or (name.startswith("_") and isinstance(module, PreTrainedModel)):
            continue
        value = vars(module)[name]
        told = _told(value) if not _is_function(value) else _named(value)
        if told is not None:
            plain[name] = told
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    plain["hooks"] = [told for hook in hooks if (told := _named(hook)) is not None]
    return type(module).__qualname__, plain


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType | partial)


def _named(value: Any) -> str | None:
    """The name of a function; None for one of a package that puts it on every model."""
    kind = getattr(value, "func", value)
    kind = kind if hasattr(kind, "__qualname__") else type(kind)
    if kind.__module__.partition(".")[0] in OWN:
        return None
    return f"{kind.__module__}.{kind.__qualname__}"


def _told(value: Any) -> Any:
    """Plain data and small containers of it; None for what is neither."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_told(part) for part in value]
        parts = sorted(parts, key=repr) if isinstance(value, set | frozenset) else parts
        return parts if all(part is not None for part in parts) else None
    if isinstance(value, dict):
        return {str(key): told for key, part in value.items() if (told := _told(part)) is not None}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value)}
        return {name: _told(part) for name, part in parts.items()}
    return None


def _plain(content: Any, without: set[str]) -> Any:
    if isinstance(content, dict):
        return {str(k): _plain(v, without) for k, v in content.items() if k not in without}
    return [_plain(v, without) for v in content] if isinstance(content, list | tuple) else content
