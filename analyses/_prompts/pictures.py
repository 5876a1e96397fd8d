"""Pictures as inputs of the tower that reads them, and captions as vectors of length 1 beside their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
NOTHING = 1e-6  # length of a difference of two directions that are the same


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


def captions_of(given: str | Path | Sequence[str] | None, setting: str) -> list[str]:
    """Captions from a list, from one text, or from a file that holds one a line."""
    if given is None:
        raise AnalysisError(f"{setting} is not given; give captions as a list, or a file with one a line")
    if isinstance(given, str | Path):
        if not _is_file(given):
            if isinstance(given, Path) or given.endswith(".txt"):
                raise AnalysisError(f"{setting}={str(given)!r}: there is no such file")
            return [given]
        given = read_text(Path(given), MOST_CAPTION_BYTES, AnalysisError).splitlines()
    found = [text.strip() for text in given if text.strip()]
    if not found:
        raise AnalysisError(f"{setting} holds no caption; give at least one")
    return found


def _is_file(given: str | Path) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # longer than any name
        return False


def directions_of(
    model: HookedModel,
    captions: Sequence[str],
    against: str | Path | Sequence[str] | None,
    alone: bool = False,
) -> Tensor:
    """Embeddings of captions less the mean of those of `against` (none: of the captions), float64 [caption, d].

    AnalysisError where nothing is left of a caption; with `alone`, one caption without `against` stays as it is.
    """
    found = embeddings_of(model, captions)
    if against is None and alone and len(captions) == 1:
        return found
    left = found - (found if against is None else embeddings_of(model, captions_of(against, "against"))).mean(
        0
    )
    empty = left.norm(dim=-1) < NOTHING
    if bool(empty.any()):
        raise AnalysisError(
            f"nothing is left of the caption {captions[int(empty.long().argmax())]!r:.60} when the mean of the others "
            "is subtracted, for they are the same; give other captions in against"
        )
    return left


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
        some = list(captions[start : start + MANY])
        found = model.tokenizer(some, padding=True, return_tensors="pt", verbose=False)
        _readable(model, some, found["input_ids"])
        given = {
            name: found[name].to(model.device) for name in ("input_ids", "attention_mask") if name in found
        }
        out = model.hf.get_text_features(**given)
        parts.append((out if isinstance(out, Tensor) else out.pooler_output).double().cpu())
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def _readable(model: HookedModel, captions: Sequence[str], ids: Tensor) -> None:
    """AnalysisError for a caption that is too long, or that holds a word which the tokenizer does not know."""
    tokenizer: Any = model.tokenizer
    most = getattr(getattr(model.hf.config, "text_config", None), "max_position_embeddings", None)
    if isinstance(most, int) and ids.shape[1] > most:
        long = max(captions, key=len)
        raise AnalysisError(
            f"the caption {long!r:.40} … has {ids.shape[1]} tokens, and {model.name} reads {most}; give a shorter one"
        )
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return  # CLIP's own tokenizer knows all letters, and its unknown token ends each text
    strange = (ids == unknown).any(1)
    if bool(strange.any()):
        text = captions[int(strange.long().argmax())]
        raise AnalysisError(
            f"{model.name} does not know all words of the caption {text!r:.60}; give words that it knows"
        )
