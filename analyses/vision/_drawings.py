"""Pictures that a text-to-image model draws for pairs of a prompt and a seed, and what a measure says of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headwater.lens.diffusion.model import DiffusionModel
from headwater.lens.diffusion.pixels import PixelPipeline
from headwater.lens.diffusion.steps import Steps
from headwater.lens.errors import AnalysisError

PictureMeasure = Callable[[list[Any], list[str]], Any]  # (pictures, their prompts) → one number for each


@dataclass(frozen=True)
class Pair:
    """What one picture is drawn from."""

    prompt: str
    seed: int


def is_drawing(model: Any) -> bool:
    """Whether a model draws pictures from prompts."""
    return isinstance(model, DiffusionModel) and model.pipeline is not None


def check_draws(model: Any, name: str) -> DiffusionModel:
    """The model; AnalysisError for one that draws nothing."""
    if not is_drawing(model):
        raise AnalysisError(
            f"{name} draws pictures from prompts, and {model.name} does not; give the pipeline of a text-to-image "
            'model, such as hw.load("t2i-digits")'
        )
    return model


def part_of(model: DiffusionModel, name: str, crosses: bool) -> DiffusionModel:
    """The model seen from its attention to words, or among patches; AnalysisError for none or several."""
    if model.parts[model.part_name].crosses == crosses:
        return model
    found = [part for part, about in model.parts.items() if about.crosses == crosses]
    if len(found) != 1:
        told = f"several such parts: model.part({found[0]!r}) chooses one" if found else "no such part"
        kind = "attention of patches to words" if crosses else "attention of patches to patches"
        raise AnalysisError(f"{name} reads {kind}, and {model.name} has {told}")
    return model.part(found[0])


def pairs_of(examples: Any, pictures: int, seed: int) -> list[Pair]:
    """`pictures` pairs for each prompt; all seeds differ."""
    texts = [examples] if isinstance(examples, str) else list(examples)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise AnalysisError(f"prompts are a text or a list of texts; got {examples!r:.60}")
    return [Pair(text, seed + n) for n, text in enumerate(text for text in texts for _ in range(pictures))]


def drawn(model: DiffusionModel, pairs: Sequence[Pair], size: int, **options: Any) -> list[Any]:
    """The picture of each pair, `size` at once, with the edits that are on."""
    found: list[Any] = []
    for first in range(0, len(pairs), size):
        some = pairs[first : first + size]
        texts, seeds = [pair.prompt for pair in some], [pair.seed for pair in some]
        out = model.generate(texts, **_seeded(model, seeds), **options)
        found += list(getattr(out, "images", out))
    return found


@contextlib.contextmanager
def recorded(model: DiffusionModel, pair: Pair, **options: Any) -> Iterator[Steps]:
    """The steps in which a pair's picture is drawn, with their maps, freed at the end."""
    with model.record_steps(statistics=(), maps="all") as steps:
        model.generate([pair.prompt], **_seeded(model, [pair.seed]), **options)
    yield steps


def measured(measure: PictureMeasure, pictures: list[Any], pairs: Sequence[Pair]) -> np.ndarray:
    """What a measure says of each picture, float64 [picture]; AnalysisError for anything else."""
    told = measure(pictures, [pair.prompt for pair in pairs])
    values = np.asarray(torch.as_tensor(told).cpu() if not isinstance(told, np.ndarray) else told, np.float64)
    if values.shape != (len(pairs),) or not np.isfinite(values).all():
        raise AnalysisError(
            f"the measure gives one finite number for each of {len(pairs)} pictures; got shape {values.shape}"
        )
    return values


def pixels(picture: Any) -> np.ndarray:
    """A picture as numbers from 0 to 1."""
    return np.asarray(picture, np.float64) / 255


def _seeded(model: DiffusionModel, seeds: list[int]) -> dict[str, Any]:
    if isinstance(model.pipeline, PixelPipeline):
        return {"seed": seeds}
    return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}  # as diffusers takes them
