"""Open a module of diffusers, or the denoiser of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from headwater.lens.diffusion.kind import Diffusion
from headwater.lens.diffusion.model import DiffusionModel
from headwater.lens.diffusion.samples import is_diffusers, sample_of
from headwater.lens.errors import ModelError
from headwater.lens.foreign.opening import open_module

CONVOLVES = "resnetblock"
DENOISERS = ("unet", "transformer", "prior", "decoder")


def is_pipeline(source: Any) -> bool:
    """Whether a source is a pipeline of diffusers."""
    return is_diffusers(source) and not isinstance(source, nn.Module) and hasattr(source, "components")


def denoiser_of(pipeline: Any) -> nn.Module:
    """The module that a pipeline calls at every step; ModelError where it has none."""
    found = (pipeline.components.get(name) for name in DENOISERS)
    denoiser = next((each for each in found if isinstance(each, nn.Module)), None)
    if denoiser is None:
        raise ModelError(
            f"{type(pipeline).__name__} has no {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]}; load the module itself"
        )
    return denoiser


def open_diffusion(module: nn.Module, sample: Any, axes: Any, pipeline: Any = None) -> DiffusionModel:
    """Open a module of diffusers, by a sample from its configuration where none is given."""
    model = open_module(module, sample_of(module) if sample is None else sample, axes, Diffusion())
    assert isinstance(model, DiffusionModel)
    model.pipeline = pipeline
    model.unread = (*model.unread, *_convolutions(module))
    return model


def _convolutions(module: nn.Module) -> list[str]:
    """Blocks between attention that mix neighbouring places of the picture."""
    found = {
        type(each).__name__: None for each in module.modules() if CONVOLVES in type(each).__name__.lower()
    }
    return [f"{name} (convolutions)" for name in found]
