"""A folder of a `PixelPipeline`: a model_index.json that names its parts, and a folder for each of them.

    model_index.json   {"_class_name": "PixelPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"],
                        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": …, "scheduler": …,
                        "height": 8, "width": 16, "guidance_scale": 2.0, "num_inference_steps": 20}
    transformer/       config.json, diffusion_pytorch_model.safetensors (a denoiser of pixels, of diffusers)
    text_encoder/      config.json, model.safetensors
    tokenizer/         tokenizer.json, tokenizer_config.json
    scheduler/         scheduler_config.json

As with every folder the weights are safetensors, and no code is taken from it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from headwater.lens.diffusion.opening import open_diffusion
from headwater.lens.diffusion.pixels import PixelPipeline
from headwater.lens.errors import ModelError
from headwater.lens.files import parse_json, read_text
from headwater.lens.loading.folder import CONFIG, CONFIG_BYTES, bounded, built, check, one_line

INDEX, KIND = "model_index.json", "PixelPipeline"
DENOISERS = ("transformer", "unet")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
MOST_PIXELS = 4096  # of a side


def is_pipeline_folder(path: Path) -> bool:
    """Whether a folder says that it is a pipeline's."""
    return (path / INDEX).is_file()


def open_pipeline(path: Path, name: str, dtype: torch.dtype | None = None) -> Any:
    """The denoiser in its pipeline; ModelError says why a folder can not be read."""
    index = _json(path / INDEX)
    kind = index.get("_class_name")
    if kind != KIND:
        raise ModelError(
            f"{path} is the folder of a {kind!r:.60} of diffusers; open it with "
            "diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True) and give that to hw.load"
        )
    if importlib.util.find_spec("diffusers") is None:
        raise ModelError(
            f"{name} needs diffusers, which is not installed (pip install 'headwater[diffusers]')"
        )
    with one_line(f"{path} can not be loaded"):
        which = next((each for each in DENOISERS if each in index), None)
        if which is None:
            raise ModelError(f"{path / INDEX} names no {' or '.join(DENOISERS)}")
        denoiser = _denoiser(path / which, _class(index, which, path), dtype)
        encoder = _encoder(path / "text_encoder", dtype)
        tokenizer = AutoTokenizer.from_pretrained(
            path / "tokenizer", trust_remote_code=False, local_files_only=True
        )
        scheduler = _class(index, "scheduler", path).from_config(_json(path / "scheduler" / SCHEDULER))
        sides = {side: _number(index, side, path) for side in ("height", "width")}
        pipeline = PixelPipeline(
            denoiser, encoder, tokenizer, scheduler, **sides, guidance_scale=float(index.get("guidance_scale", 1.0)),
            num_inference_steps=int(index.get("num_inference_steps", 20)),
        )  # fmt: skip
        model = open_diffusion(denoiser, _sample(pipeline), None, pipeline)
    model.name = name
    return model


def _denoiser(path: Path, kind: Any, dtype: torch.dtype | None) -> torch.nn.Module:
    """The denoiser with all of its weights; its shapes are held to the size of the file before memory is taken."""
    config, file = _json(path / CONFIG), path / WEIGHTS
    if not file.is_file() or file.is_symlink():
        raise ModelError(f"{path} has no file {WEIGHTS}")
    with torch.device("meta"):
        numbers = sum(each.numel() for each in kind.from_config(config).parameters())
    if numbers > 8 * file.stat().st_size:
        raise ModelError(
            f"{path / CONFIG} describes {numbers:,} numbers; the file has {file.stat().st_size:,} bytes"
        )
    module = kind.from_config(config)
    stored = load_file(file)
    if not all(bool(each.isfinite().all()) for each in stored.values()):
        raise ModelError(f"{file} holds numbers that are not finite")
    module.load_state_dict(stored, strict=True)
    return (module if dtype is None else module.to(dtype)).eval().requires_grad_(False)


def _encoder(path: Path, dtype: torch.dtype | None) -> torch.nn.Module:
    folder = check(path, fewest_layers=0)  # a table of words and their positions alone
    encoder, report = built(folder, dtype)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the weights in {path} lack {missing[0]}")
    return encoder.eval().requires_grad_(False)


def _class(index: dict[str, Any], part: str, path: Path) -> Any:
    """A class of diffusers by the name that the index gives for a part."""
    told = index.get(part)
    name = told[1] if isinstance(told, list) and len(told) == 2 and told[0] == "diffusers" else None
    diffusers = importlib.import_module("diffusers")
    base = diffusers.SchedulerMixin if part == "scheduler" else diffusers.ModelMixin
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ModelError(f"{path / INDEX}: {part} is no class of diffusers; got {told!r:.80}")
    return kind


def _sample(pipeline: PixelPipeline) -> dict[str, Any]:
    """A call of the denoiser as the pipeline makes it."""
    states, _ = pipeline.encode(["", ""])
    states = states.repeat(1, 7, 1)  # a length that grids of pictures do not have
    states = states + torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    x = pipeline.noise((0, 1)).to(states)
    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    takes_more = getattr(pipeline.denoiser, "use_additional_conditions", None) is not None
    return {
        "hidden_states": x, "timestep": torch.full((2,), 10), "encoder_hidden_states": states,
        **(more if takes_more else {}),
    }  # fmt: skip


def _number(index: dict[str, Any], name: str, path: Path) -> int:
    value = index.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST_PIXELS:
        raise ModelError(
            f"{path / INDEX}: {name} is a whole number from 1 to {MOST_PIXELS}; got {value!r:.40}"
        )
    return value


def _json(path: Path) -> dict[str, Any]:
    found = (
        parse_json(read_text(path, CONFIG_BYTES, ModelError), str(path), ModelError)
        if path.is_file()
        else None
    )
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no JSON object")
    return bounded(found, path)
