"""Images beside a text and inside of it: how many tokens each takes, and which row each belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import (
    FLOATS,
    compares,
    float_input,
    image_tokens,
    markers,
    pair,
    vision_config,
)
from headwater.lens.naming.tokens import Tokens, is_of_tokens


def with_images(model: Opened, found: Tokens, extra: dict[str, Tensor]) -> Tokens:
    """A text with its images; one image token per image is repeated to the number of tokens that an image takes."""
    marker, pixels = model.image_token, extra.get("pixel_values")
    _refuse_markers(model, found, extra)
    check_pictures(model, pixels)
    seen = any(FLOATS.get(name) == "image" for name in extra)
    if not seen and "vision" in model.parts and (model.part_name == "vision" or compares(model.hf)):
        what = "compares texts with images" if compares(model.hf) else "is read as its tower of images"
        raise PromptError(f"{model.name} {what}, and no image is given; give pixel_values=…")
    extra = {**found.more, **extra}
    _refuse_missing(model, extra)
    per_image = 0 if pixels is None or marker is None else tokens_of_image(model, pixels)
    if pixels is not None and per_image:
        places = (found.ids == marker) & found.mask
        count = int(places.sum())
        if count == len(pixels) and per_image > 1:
            found = _repeated(found.changed(found.ids, found.mask, extra), places, per_image)
            extra = dict(found.more)
        elif count != len(pixels) * per_image:
            raise PromptError(
                f"{len(pixels)} images take {len(pixels) * per_image} image tokens ({marker}) in the text, or one "
                f"each; got {count}"
            )
    return Tokens(found.ids, found.mask, extra, found.labels, _owners(model, found, extra))


def without_images(model: Opened, one: Tokens) -> Tokens:
    """One prompt without the tokens that stand for pictures, and without the pictures; PromptError where none does."""
    picture = (one.ids == model.image_token).cpu() if model.image_token is not None else None
    if len(one) != 1 or picture is None or not picture.any():
        raise PromptError(
            f"{len(one)} prompts of {model.name}, {0 if picture is None else int(picture.any(1).sum())} with image "
            "tokens; give one with an image in its text"
        )
    kept = (one.mask.cpu() & ~picture)[0]
    more = {
        name: given[:, kept.to(given.device)]
        for name, given in one.more.items()
        if is_of_tokens(name, given, one.shape)
    }
    return one.changed(one.ids[:, kept], one.mask[:, kept], more)


def _owners(model: Opened, found: Tokens, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The row of each image and video, of each of their patches where these lie one behind the other (Qwen-VL)."""
    owners: dict[str, Tensor] = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        given, sizes = extra.get(pixels), extra.get(f"{kind}_grid_thw")
        if given is None:
            continue
        entries = None if sizes is None else sizes.prod(-1).cpu()  # patches of each picture
        pictures = len(given) if sizes is None else len(sizes)
        per_row = ((found.ids == markers(model.hf).get(kind, -1)) & found.mask).sum(-1).cpu()
        rows = _dealt(per_row, torch.ones(pictures) if entries is None else entries)
        if rows is None:
            continue
        owners[pixels] = rows if entries is None else rows.repeat_interleave(entries)
        for name, more in extra.items():
            if name != pixels and name.startswith((f"{kind}_", "pixel_attention")) and len(more) == pictures:
                owners[name] = rows
    return owners


def _dealt(per_row: Tensor, sizes: Tensor) -> Tensor | None:
    """The row of each picture, [picture]: the tokens that stand for pictures, row by row, in shares of their sizes.

    None where the shares do not end where the rows do.
    """
    if not per_row.sum():
        return None
    ends = (sizes.double().cumsum(0) * int(per_row.sum()) / sizes.sum()).round().long()
    borders = per_row.cumsum(0)
    if not torch.isin(borders, torch.cat([ends, ends.new_zeros(1)])).all():
        return None
    return torch.searchsorted(borders, ends)


def tokens_of_image(model: Opened, pixels: Tensor) -> int:
    """How many tokens one of these images takes in a text; 0 if unknown."""
    if "vision" not in model.parts or pixels.dim() != 4:
        return 0
    if tuple(pixels.shape[-2:]) == pair(getattr(vision_config(model.hf), "image_size", None)):
        return model.image_tokens
    size = pair(getattr(vision_config(model.hf), "image_size", None))
    found = image_tokens(model.hf, pixels[:1].to(model.device, model.dtype))
    if not found and model.image_tokens and size is not None:
        raise PromptError(
            f"{model.name} does not take pictures of {pixels.shape[-2]}×{pixels.shape[-1]} pixels; give pictures of "
            f"{size[0]}×{size[1]}, as its processor makes them"
        )
    return found


def check_pictures(model: Opened, pixels: Tensor | None) -> None:
    """PromptError for one picture without the axis of the batch, and for another number of channels."""
    channels = getattr(vision_config(model.hf), "num_channels", None)
    if pixels is None or not isinstance(channels, int):
        return
    size = pair(getattr(vision_config(model.hf), "image_size", None))
    if pixels.dim() == 3 and tuple(pixels.shape) == (channels, *(size or ())):
        raise PromptError(
            f"pixel_values {list(pixels.shape)} is one picture without the axis of images; give pixel_values[None]"
        )
    patch = pair(getattr(vision_config(model.hf), "patch_size", None))
    small = patch is not None and pixels.dim() == 4 and any(map(int.__lt__, pixels.shape[-2:], patch))
    if size is not None and (small or pixels.dim() < 3):
        raise PromptError(
            f"pixel_values {list(pixels.shape)} hold no patch of {model.name}; give [image, channel, height, width], "
            "as its processor makes them"
        )
    if pixels.dim() == 4 and pixels.shape[1] != channels:
        raise PromptError(
            f"pixel_values {list(pixels.shape)} is not of the {channels} channels that {model.name} reads; give "
            "[image, channel, height, width]"
        )


def _refuse_missing(model: Opened, extra: Mapping[str, Any]) -> None:
    """PromptError for an input that the model can not run without."""
    for name, parameter in inspect.signature(model.hf.forward).parameters.items():
        plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if plain and parameter.default is parameter.empty and name in FLOATS and name not in extra:
            raise PromptError(f"{model.name} does not run without {name}; give {name}=…")


def _refuse_markers(model: Opened, found: Tokens, extra: Mapping[str, Tensor]) -> None:
    """PromptError for a token that stands for an image, a video or a sound which is not given."""
    for kind, marker in markers(model.hf).items():
        there = (found.ids == marker) & found.mask
        given = any(kind in name or FLOATS.get(name) == kind for name in extra)
        if there.any() and not given:
            row, column = there.nonzero()[0].tolist()
            raise PromptError(
                f"token {marker} at batch {row}, position {column} stands for {'an' if kind[0] in 'ai' else 'a'} "
                f"{kind}, and none is given; give {float_input(model.hf) or kind}=…, or leave the token out"
            )


def _repeated(found: Tokens, places: Tensor, times: int) -> Tokens:
    """The rows with `times` tokens in each of the places; rows that become shorter than others are padded."""
    repeats = torch.where(places, times, 1)
    lengths = repeats.sum(-1)
    left = not bool(found.mask[:, 0].all())

    def spread(given: Tensor) -> Tensor:
        rows = []
        for row, each, length in zip(given, repeats.to(given.device), lengths, strict=True):
            gap = int(lengths.max() - length)
            rows.append(torch.nn.functional.pad(row.repeat_interleave(each), (gap, 0) if left else (0, gap)))
        return torch.stack(rows)

    more = {
        name: spread(given) if given.shape == found.mask.shape else given
        for name, given in found.more.items()
    }
    return found.changed(spread(found.ids), spread(found.mask), more)
