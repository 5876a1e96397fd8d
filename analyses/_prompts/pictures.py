"""Pictures as inputs of the tower that reads them, and captions as vectors of length 1 beside their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Examples
from headwater.lens.errors import AnalysisError
from headwater.lens.examples.example import Example
from headwater.lens.examples.inputs import as_inputs
from headwater.lens.files import read_text
from headwater.lens.model import HookedModel
from headwater.lens.models.signature import compares
from headwater.lens.naming.tokens import Tokens

MOST_CAPTION_BYTES = 2**24
MANY = 256  # captions that are embedded together


def tower_of(model: HookedModel) -> HookedModel:
    """The part of a model that reads pictures; AnalysisError where no embedding or class is read off it."""
    if "vision" in model.parts:
        if compares(model.hf):
            return model.part("vision")
        if model.part_name == next(iter(model.parts)) == "vision":
            return model
    raise AnalysisError(
        f"{model.name} reads no pictures into an embedding or into classes of their own; give a CLIP, a ViT or a DINOv2"
    )


def pixels_of(model: HookedModel, examples: Examples) -> Tensor:
    """Pictures [picture, channel, height, width] of whatever `to_tokens` takes; texts beside them are left aside."""
    if isinstance(examples, Tokens):
        pixels = examples.more.get("pixel_values")
    elif isinstance(examples, Tensor) and examples.is_floating_point():
        pixels = examples
    else:
        if isinstance(examples, Sequence) and not isinstance(examples, str | bytes) and not examples:
            raise AnalysisError("there are no pictures; give at least one")
        pixels = as_inputs(model, _without_texts(model, examples), None, {}, "right").more.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        raise AnalysisError(
            "this reads pictures; give paths, images of PIL or pixel_values [picture, channel, height, width]"
            + (f"; got {list(pixels.shape)}" if isinstance(pixels, Tensor) else "")
        )
    return pixels


def _without_texts(model: HookedModel, examples: Examples) -> Examples:
    """Examples as their pictures alone; a model of two towers would ask for texts beside them."""
    if not compares(model.hf):
        return examples
    listed = list(examples) if isinstance(examples, list | tuple) else [examples]
    shots = [each.image if isinstance(each, Example) else each for each in listed]
    if any(each is None for each in shots):
        raise AnalysisError(
            f"example {[each is None for each in shots].index(True)} has no picture; give image="
        )
    return [Example(image=each, ids=[0]) for each in shots]


def tokens_of(model: HookedModel, pixels: Tensor) -> Tokens:
    """Inputs of a run on pictures; a model of two towers, which runs both, gets one token beside each."""
    if not compares(model.hf):
        return model.to_tokens(pixels)
    ids = torch.zeros(len(pixels), 1, dtype=torch.long)
    return model.to_tokens(ids, pixel_values=pixels)


def captions_of(given: str | Sequence[str] | None, setting: str) -> list[str]:
    """Captions from a list, from one text, or from a file that holds one a line."""
    if given is None:
        raise AnalysisError(f"{setting} is not given; give captions as a list, or a file with one a line")
    if isinstance(given, str):
        if not Path(given).is_file():
            if given.endswith(".txt"):
                raise AnalysisError(f"{setting}={given!r}: there is no such file")
            return [given]
        given = read_text(Path(given), MOST_CAPTION_BYTES, AnalysisError).splitlines()
    found = [text.strip() for text in given if text.strip()]
    if not found:
        raise AnalysisError(f"{setting} holds no caption; give at least one")
    return found


@torch.no_grad()
def embeddings_of(model: HookedModel, captions: Sequence[str]) -> Tensor:
    """Embeddings of captions at length 1, float64 [caption, d]; AnalysisError for a model without a tower of texts."""
    if not compares(model.hf) or not hasattr(model.hf, "get_text_features"):
        raise AnalysisError(
            f"{model.name} embeds no texts, so no caption can be compared with a picture; give a CLIP"
        )
    if model.tokenizer is None:
        raise AnalysisError(
            f"{model.name} has no tokenizer to read captions with; give load(model, tokenizer=…)"
        )
    parts = []
    for start in range(0, len(captions), MANY):
        found = model.tokenizer(list(captions[start : start + MANY]), padding=True, return_tensors="pt")
        given = {
            name: found[name].to(model.device) for name in ("input_ids", "attention_mask") if name in found
        }
        out = model.hf.get_text_features(**given)
        parts.append((out if isinstance(out, Tensor) else out.pooler_output).double().cpu())
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)
