"""`Revision`: a digest of everything in a model that decides its numbers.

It is a sha256 over every byte of every parameter and buffer, the class and plain attributes of every module (scales,
windows, adapters that are on), functions put on a module (hooks, a `forward` of its own), the rules that a folder
declares, and the configuration without what only names things. The precision is part of it: the same file opened in
float32 and in bfloat16 gives other numbers. Models from a folder and from memory are treated alike.

Cost: one pass over the weights when it is first asked for, on two threads, about half a second per GB on a current
processor. Later calls hash what is no weight, and only tensors that torch counts as changed since or of which a sample
of numbers differs (lens/digest/samples.py): torch does not count what is written through `.data` or numpy.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.lens.digest.layout import Layout, written
from headwater.lens.digest.samples import Samples

PREFIX = "model-sha256:"
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
        self._layout: Layout | None = None
        # the buffers that a run computes anew for its length, as they are now
        self._moving = {
            name: _of_tensor(buffer)
            for name, buffer in hf.named_buffers()
            if _moves(hf.get_submodule(name.rpartition(".")[0]))
        }

    def __getstate__(self) -> dict[str, Any]:
        # a copy has tensors of its own
        return {**vars(self), "_known": {}, "_samples": None, "_layout": None}

    def now(self) -> str:
        """`model-sha256:` and 64 digits."""
        if self._layout is None or not self._layout.still():
            self._layout = Layout(self.hf)
        weights = self._layout.weights()
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
        told = [written(_plain(self.hf.config.to_dict(), NAMING)).encode() + b"\n", *self._layout.lines()]
        for name, buffer in self._layout.buffers():
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


def _plain(content: Any, without: set[str]) -> Any:
    if isinstance(content, dict):
        return {str(k): _plain(v, without) for k, v in content.items() if k not in without}
    return [_plain(v, without) for v in content] if isinstance(content, list | tuple) else content
