"""A folder of a `PixelPipeline`: a model_index.json that names its parts, and a folder for each of them.

    model_index.json   {"_class_name": "PixelPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"],
                        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": …, "scheduler": …,
                        "height": 8, "width": 16, "guidance_scale": 2.0, "num_inference_steps": 20}
    transformer/       config.json, diffusion_pytorch_model.safetensors (a denoiser of pixels, of diffusers; or unet/)
    text_encoder/      config.json, model.safetensors
    tokenizer/         tokenizer.json, tokenizer_config.json
    scheduler/         scheduler_config.json

As with every folder the weights are safetensors, no code is taken from it, and no file from elsewhere. Numbers that
would take memory are bounded before anything is built.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from headwater.lens.diffusion.opening import open_diffusion
from headwater.lens.diffusion.pixels import MOST_STEPS, PixelPipeline
from headwater.lens.diffusion.samples import STATES
from headwater.lens.errors import ModelError
from headwater.lens.examples.settings_files import check_sizes, check_tokenizers
from headwater.lens.files import parse_json, read_text
from headwater.lens.loading.folder import (
    CONFIG,
    CONFIG_BYTES,
    LIMITS,
    bounded,
    built,
    check,
    one_line,
    refuse_links,
)

INDEX, KIND = "model_index.json", "PixelPipeline"
DENOISERS = ("transformer", "unet")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
MOST_PIXELS = 4096  # of a side
MOST_PATCHES = 2**13  # that look at each other
MOST_TABLE = 2**26  # numbers of a table of positions, which diffusers computes before anything can be checked
DEEP = re.compile(r"layers|depth|blocks")


def is_pipeline_folder(path: Path) -> bool:
    """Whether a folder says that it is a pipeline's."""
    return (path / INDEX).is_file()


def open_pipeline(path: Path, name: str, dtype: torch.dtype | None = None) -> Any:
    """The denoiser in its pipeline; ModelError says why a folder can not be read."""
    refuse_links(path)
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
        sides = {side: int(_number(index, side, path, most=MOST_PIXELS)) for side in ("height", "width")}
        steps = int(_number(index, "num_inference_steps", path, 20, most=MOST_STEPS))
        guidance = float(_number(index, "guidance_scale", path, 1.0, whole=False))
        denoiser = _denoiser(path / which, _class(index, which, path), dtype, sides)
        encoder = _encoder(path / "text_encoder", dtype)
        if not (path / "tokenizer").is_dir():
            raise ModelError(f"{path} has no folder tokenizer")
        check_sizes(path / "tokenizer")
        check_tokenizers(path / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(
            path / "tokenizer", trust_remote_code=False, local_files_only=True
        )
        scheduler = _class(index, "scheduler", path).from_config(_json(path / "scheduler" / SCHEDULER))
        if scheduler.config.get("stochastic_sampling"):
            raise ModelError(f"{path}: stochastic_sampling draws noise that no seed gives; set it to false")
        rows, most = encoder.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
        if most >= rows:
            raise ModelError(
                f"the tokenizer in {path} has token {most}; the text encoder knows {rows} tokens"
            )
        pipeline = PixelPipeline(
            denoiser,
            encoder,
            tokenizer,
            scheduler,
            **sides,
            guidance_scale=guidance,
            num_inference_steps=steps,
        )
        pipeline("", num_inference_steps=2, output_type="pt")  # what can not draw is refused here
        model = open_diffusion(denoiser, _sample(pipeline), None, pipeline)
    model.name = name
    return model


def _check_sizes(path: Path, config: dict[str, Any], sides: dict[str, int]) -> None:
    """Refuse sizes of a denoiser that would take memory for something else than its weights."""
    for name, value in config.items():
        if DEEP.search(name) and isinstance(value, int) and value > LIMITS["num_hidden_layers"]:
            raise ModelError(f"{path}: {name} is {value}; it may be at most {LIMITS['num_hidden_layers']}")
    patch = config.get("patch_size")
    patch = patch if isinstance(patch, int) and patch > 0 else 1
    if any(side % patch for side in sides.values()):
        raise ModelError(
            f"{path.parent.parent / INDEX}: height and width are multiples of a patch, {patch} pixels"
        )
    if math.prod(sides.values()) > MOST_PATCHES * patch**2:
        told = " × ".join(f"{side}" for side in sides.values())
        raise ModelError(
            f"{path}: {told} pixels are more than {MOST_PATCHES} patches of {patch} × {patch} pixels"
        )
    size = config.get("sample_size")
    size = math.prod(size) if isinstance(size, list) else (size or 0) ** 2
    width = (config.get("num_attention_heads") or 1) * (config.get("attention_head_dim") or 1)
    if size // patch**2 * width > MOST_TABLE:
        raise ModelError(f"{path}: sample_size is {config['sample_size']}, more than a picture of pixels has")


def _denoiser(
    path: Path, kind: Any, dtype: torch.dtype | None, sides: dict[str, int]
) -> torch.nn.Module:  # fmt: skip
    """The denoiser with all of its weights; its shapes are held to the size of the file before memory is taken."""
    config, file = _json(path / CONFIG), path / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{path} has no file {WEIGHTS}")
    _check_sizes(path / CONFIG, config, sides)
    with torch.device("meta"):
        numbers = sum(each.numel() for each in kind.from_config(config).parameters())
    if numbers > 8 * file.stat().st_size:
        raise ModelError(
            f"{path / CONFIG} describes {numbers:,} numbers; the file has {file.stat().st_size:,} bytes"
        )
    module = kind.from_config(config)
    if module.config.get("out_channels") not in (None, module.config.in_channels):
        raise ModelError(f"{path / CONFIG}: a denoiser of pixels gives as many channels as it takes")
    stored = load_file(file)
    if not all(bool(each.isfinite().all()) for each in stored.values()):
        raise ModelError(f"{file} holds numbers that are not finite")
    module.load_state_dict(stored, strict=True)
    return (module if dtype is None else module.to(dtype)).eval().requires_grad_(False)


def _encoder(path: Path, dtype: torch.dtype | None) -> Any:
    folder = check(path, fewest_layers=0)  # a table of words and their positions alone
    encoder, report = built(folder, dtype)
    for kind, what in (("missing", "lack"), ("unexpected", "have unknown")):
        if names := sorted(report[f"{kind}_keys"]):
            raise ModelError(f"the weights in {path} {what} {names[0]}")
    if not all(bool(each.isfinite().all()) for each in encoder.parameters()):
        raise ModelError(f"the weights in {path} hold numbers that are not finite")
    return encoder.eval().requires_grad_(False)


def _class(index: dict[str, Any], part: str, path: Path) -> Any:
    """A class of diffusers by the name that the index gives for a part."""
    told = index.get(part)
    name = told[1] if isinstance(told, list) and len(told) == 2 and told[0] == "diffusers" else None
    diffusers = importlib.import_module("diffusers")
    base = diffusers.SchedulerMixin if part == "scheduler" else diffusers.ModelMixin
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, base) and hasattr(kind, "from_config")):
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
    latents = next(iter(inspect.signature(pipeline.denoiser.forward).parameters))
    return {latents: x, "timestep": torch.full((2,), 10), STATES: states, **(more if takes_more else {})}


def _number(
    index: dict[str, Any], name: str, path: Path, default: float | None = None, *, most: int = 2**20, whole: bool = True
) -> float:  # fmt: skip
    value = index.get(name, default)
    kinds = int if whole else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or not (1 if whole else -most) <= value <= most
    ):
        told = f"a whole number from 1 to {most}" if whole else f"a number from {-most} to {most}"
        raise ModelError(f"{path / INDEX}: {name} is {told}; got {value!r:.40}")
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
