"""A small input for a denoiser or an autoencoder of diffusers, from its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.errors import ModelError

BATCH = 2
WORDS = 7  # a length that grids of pictures do not have
STATES = "encoder_hidden_states"


def is_diffusers(given: Any) -> bool:
    """Whether an object is of a class of diffusers, or of one derived from it."""
    return any(kind.__module__.startswith("diffusers.") for kind in type(given).__mro__)


def sample_of(module: nn.Module) -> dict[str, Any]:
    """What `module.forward` takes, sized by its configuration; ModelError where that does not say enough."""
    config = dict(getattr(module, "config", {}))
    takes = inspect.signature(module.forward).parameters
    first = next(iter(takes))
    try:
        found: dict[str, Any] = _picture(config, first, takes)
        if "timestep" in takes:
            found["timestep"] = torch.full((BATCH,), 10)
        if STATES in takes and (width := _width_of_words(config)):
            found[STATES] = torch.randn(BATCH, WORDS, width)
        found |= _conditions(config, takes)
    except (KeyError, TypeError, ValueError, StopIteration):
        raise _unsaid(module) from None
    weight = next((each for each in module.parameters() if each.is_floating_point()), torch.zeros(0))
    return {name: _placed(each, weight) for name, each in found.items()}


def _placed(given: Any, weight: Tensor) -> Any:
    """A tensor on the device of the weights, and in their precision if it holds no whole numbers."""
    if isinstance(given, dict):
        return {name: _placed(each, weight) for name, each in given.items()}
    if not isinstance(given, Tensor):
        return given
    return given.to(weight.device, weight.dtype if given.is_floating_point() else None)


def _picture(config: dict[str, Any], first: str, takes: Any) -> dict[str, Any]:
    """Latents [batch, channel, row, column], or the patches of a picture in one row with their places (FLUX)."""
    channels = int(config["in_channels"])
    if "img_ids" in takes:
        rows, columns = 4, 4
        places = torch.zeros(rows, columns, 3)
        places[..., 1], places[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        return {
            first: torch.randn(BATCH, rows * columns, channels), "img_ids": places.reshape(-1, 3),
            "txt_ids": torch.zeros(WORDS, 3),
        }  # fmt: skip
    size = config.get("sample_size") or 16
    rows, columns = size if isinstance(size, list | tuple) else (size, size)
    return {first: torch.randn(BATCH, channels, int(rows), int(columns))}


def _width_of_words(config: dict[str, Any]) -> int | None:
    for name in ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim"):
        value = config.get(name)
        if value:
            return int(value[0] if isinstance(value, list | tuple) else value)
    return None


def _conditions(config: dict[str, Any], takes: Any) -> dict[str, Any]:
    """What a denoiser reads beside the picture, the time and the words."""
    found: dict[str, Any] = {}
    if config.get("pooled_projection_dim") and "pooled_projections" in takes:
        found["pooled_projections"] = torch.randn(BATCH, config["pooled_projection_dim"])
    if config.get("guidance_embeds"):
        found["guidance"] = torch.ones(BATCH)
    classes = config.get("num_class_embeds") or (
        config.get("norm_type") == "ada_norm_zero" and config.get("num_embeds_ada_norm")
    )
    if classes and "class_labels" in takes:
        found["class_labels"] = torch.zeros(BATCH, dtype=torch.long)
    if config.get("addition_embed_type") == "text_time":  # Stable Diffusion XL
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        more: dict[str, Tensor | None] = {
            "text_embeds": torch.randn(BATCH, pooled), "time_ids": torch.ones(BATCH, 6)
        }  # fmt: skip
        found["added_cond_kwargs"] = more
    elif config.get("caption_channels") and "added_cond_kwargs" in takes:  # PixArt
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return found


def _unsaid(module: nn.Module) -> ModelError:
    name = type(module).__name__
    return ModelError(
        f"the configuration of {name} does not say what its forward takes; give hw.load(module, sample={{…}})"
    )
