"""`convert`: the files of a package as a folder that transformers reads: safetensors, config.json, a tokenizer.

The result depends on the files alone: `weights_digest` of it is compared with the one in the registry. Reading GGUF
files takes the packages `gguf` and `accelerate`, ONNX files `onnx`, once.

- GGUF (smollm2-135m): transformers dequantises the weights and rebuilds the tokenizer. They are saved as the float32
  model that they are now, without a mark that they came from 4 bits.
- ONNX (dinov2-small): the backbone's biases, norms, scales and class token are initialisers with their module's name.
  A linear layer's weight is the unnamed operand of the MatMul node that is called after the module, transposed. The
  positions are the two constants that are joined and added. The mask token, which nothing reads, is zero.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

from headwater.lens.errors import ModelError

BACKBONE = "backbone."
READERS = {
    "gguf": ("gguf", "accelerate"),
    "onnx": ("onnx",),
}  # transformers reads GGUF only beside accelerate
# the steps from a picture to pixels, as DINOv2's authors publish them; the means are those of ImageNet's channels
PICTURES = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def check_reader(form: str) -> None:
    """ModelError where a package that reads this format is missing."""
    for package in READERS.get(form, ()):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"reading the file takes the package {package}, which is missing; pip install 'headwater[real]'"
            )


def convert(form: str, given: Path, made: Path) -> None:
    """Turn the files in the folder `given` into a model's folder `made`."""
    work: dict[str, Callable[[Path, Path], None]] = {"gguf": _gguf, "onnx": _onnx, "folder": _folder}
    with contextlib.redirect_stderr(io.StringIO()):  # bars, which are drawn into pipes too
        work[form](given, made)


def weights_digest(folder: Path) -> str:
    """sha256 over the names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _folder(given: Path, made: Path) -> None:
    for file in sorted(given.iterdir()):
        shutil.move(file, made / file.name)


def _gguf(given: Path, made: Path) -> None:
    (file,) = given.iterdir()
    read = AutoModelForCausalLM.from_pretrained(given, gguf_file=file.name, dtype=torch.float32)
    told = read.config.to_dict()
    for field in ("quantization_config", "_name_or_path"):
        told.pop(field, None)
    plain = type(read)(type(read.config)(**told))
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.save_pretrained(made)
    AutoTokenizer.from_pretrained(given, gguf_file=file.name).save_pretrained(made)


def _onnx(given: Path, made: Path) -> None:
    import onnx

    (file,) = given.iterdir()
    graph = onnx.load(file, load_external_data=False).graph
    state = {name: torch.tensor(value) for name, value in _backbone(graph).items()}
    width = state["embeddings.cls_token"].shape[-1]
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    places = state["embeddings.position_embeddings"].shape[1] - 1
    layers = len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})
    state["embeddings.mask_token"] = torch.zeros(1, width)
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, patch_size=patch,
        image_size=patch * round(places**0.5), architectures=["Dinov2Model"],
    )  # fmt: skip
    # the file has the names that transformers used before version 5: it renames them as it reads
    older = given / "older"
    older.mkdir()
    config.save_pretrained(older)
    save_file(state, older / "model.safetensors", metadata={"format": "pt"})
    read: Any = Dinov2Model.from_pretrained(older, output_loading_info=True)
    model, report = read
    if faults := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise ModelError(f"{file.name} does not hold the weights of a Dinov2Model, first {faults[0]}")
    model.save_pretrained(made)
    (made / "preprocessor_config.json").write_text(json.dumps(PICTURES, indent=2) + "\n", encoding="utf-8")


def _backbone(graph: Any) -> dict[str, np.ndarray]:
    """The tensors of the backbone by the path of their module."""
    from onnx import numpy_helper

    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = {
        name.removeprefix(BACKBONE): value for name, value in constants.items() if name.startswith(BACKBONE)
    }
    for node in graph.node:
        operand = next((name for name in node.input if name in constants), None)
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and operand is not None:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{module}.weight"] = constants[operand].T.copy()
    width = found["embeddings.cls_token"].shape[-1]
    rows = [
        value for name, value in constants.items()
        if name.startswith("onnx::") and value.ndim == 3 and value.shape[0] == 1 and value.shape[2] == width
    ]  # fmt: skip
    of_class, of_patches = sorted(rows, key=lambda value: value.shape[1])
    found["embeddings.position_embeddings"] = np.concatenate([of_class, of_patches], axis=1)
    return found
