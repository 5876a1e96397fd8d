"""`Revision`: a digest of everything in a model that decides its numbers.

It is a sha256 over every byte of every parameter and buffer, the class and plain attributes of every module (scales,
windows, adapters that are on), the rules that a folder declares, and the configuration without what only names things.
The precision is part of it: the same file opened in float32 and in bfloat16 gives other numbers. Models from a folder
and from memory are treated alike.

Cost: one pass over the weights when it is first asked for, on two threads, about half a second per GB on a current
processor. Later calls hash only tensors that torch counts as changed since. Writing through `.data` is not counted.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PREFIX = "model-sha256:"
PLAIN = (bool, int, float, str, type(None))
# attributes that name things, or that change from run to run without changing a number
NAMES = {
    "training", "name_or_path", "warnings_issued", "layer_idx", "layer_id", "supports_gradient_checkpointing",
    "gradient_checkpointing", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method",
    "dtype", "max_seq_len_cached", "config", "generation_config", "all_tied_weights_keys", "loss_type", "model_tags",
}  # fmt: skip
OF_TORCH = set(vars(nn.Module()))
# fields of a configuration that name things, choose what is returned, or say how the model was saved
NAMING = {
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "attn_implementation",
    "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "id2label", "label2id", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "task_specific_params", "problem_type", "torchscript", "auto_map",
    "quantization_config",
}  # fmt: skip


class Revision:
    """The digest of one model. `settle` takes what is no weight; `now` gives the whole, of the weights as they are."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.files: tuple[Path, ...] = ()  # the weight files, where it came from a folder
        self._known: dict[str, tuple[_State, str]] = {}
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": {}}  # a copy has tensors of its own

    def settle(self) -> None:
        """Digest everything but the weights, as it is now: a run may move buffers that it computes for itself."""
        digest = hashlib.sha256()
        for line in (_plain(self.hf.config.to_dict(), NAMING), *_modules(self.hf)):
            digest.update(json.dumps(line, sort_keys=True, default=repr).encode() + b"\n")
        kept = self.hf.state_dict().keys()
        for name, buffer in sorted(self.hf.named_buffers()):
            if name not in kept:
                digest.update(f"{name} {_of_tensor(buffer)}\n".encode())
        self._rest = digest.hexdigest()

    def now(self) -> str:
        """`model-sha256:` and 64 digits."""
        weights = sorted(self.hf.state_dict(keep_vars=True).items())
        stale = [(name, value) for name, value in weights if self._stale(name, value)]
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(_of_value, (value for _, value in stale))
            for (name, value), digest in zip(stale, found, strict=True):
                self._known[name] = (_State.of(value), digest)
        digest = hashlib.sha256(self._rest.encode())
        for name, _ in weights:
            digest.update(f"{name} {self._known[name][1]}\n".encode())
        return PREFIX + digest.hexdigest()

    def matches(self, told: str) -> bool:
        """Whether a file means this model by its revision; before there was `PREFIX`, it was of the weight files."""
        return told == (self.now() if told.startswith(PREFIX) else of_files(self.files))

    def _stale(self, name: str, value: Any) -> bool:
        return name not in self._known or not self._known[name][0].still(value)


class _State(NamedTuple):
    """What changes when torch writes to a tensor or another one takes its place; nothing is known of other values."""

    tensor: weakref.ref[Tensor] | None
    place: int
    version: int

    @classmethod
    def of(cls, value: Any) -> _State:
        if not isinstance(value, Tensor):
            return cls(None, 0, 0)
        return cls(weakref.ref(value), value.data_ptr(), value._version)

    def still(self, value: Any) -> bool:
        return (
            self.tensor is not None
            and self.tensor() is value
            and self[1:] == (value.data_ptr(), value._version)
        )


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


def _modules(hf: nn.Module) -> Iterator[Any]:
    """The class and the plain attributes of every module, by path."""
    for path, module in sorted(hf.named_modules()):
        plain = {}
        for name, value in vars(module).items():
            # of a whole model, names with an underscore are plans for loading and for many devices
            if name in OF_TORCH or name in NAMES or name.startswith("_is_hf"):
                continue
            if name.startswith("_") and isinstance(module, PreTrainedModel):
                continue
            told = _told(value)
            if told is not None:
                plain[name] = told
        yield path, type(module).__qualname__, plain


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
        return {n: _of_tensor(v) if isinstance(v, Tensor) else _told(v) for n, v in parts.items()}
    return None


def _plain(content: Any, without: set[str]) -> Any:
    if isinstance(content, dict):
        return {str(k): _plain(v, without) for k, v in content.items() if k not in without}
    return [_plain(v, without) for v in content] if isinstance(content, list | tuple) else content
