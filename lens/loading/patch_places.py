"""Find where the patches of an image stand among the tokens of its tower, from runs on changed pictures.

A token that changes with the picture is a patch; class tokens, registers and detection tokens enter the first layer
the same for every picture. Changed corners of the picture tell whether the patches stand row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention import context, windows
from headwater.lens.attention.module_hooks import hidden_states, on
from headwater.lens.models.parts import Part, pictures
from headwater.lens.models.patches import Patches, special_names

STRIDES = (4, 8, 16, 32, 64)  # pixels between two positions behind convolutions


class _Seen(Exception):
    """Ends a run once the first layer of the tower has its input."""


def with_patches(hf: Any, parts: Mapping[str, Part], sample: Mapping[str, Tensor]) -> dict[str, Part]:
    """The parts, with the places of the patches in those that read images.

    A part in which patches do not stand row by row in one piece has no `patches`; its tokens have numbers for names.
    """
    if not pictures(sample):
        return dict(parts)
    found = {}
    for name, part in parts.items():
        guess = part.patches or _behind_convolutions(part, sample)
        found[name] = part if guess is None else replace(part, patches=_placed(hf, part, guess, sample))
    return found


def _behind_convolutions(part: Part, sample: Mapping[str, Tensor]) -> Patches | None:
    """The guess that each token is what convolutions made of a square of pixels (DETR), from the number of tokens."""
    pixels, count = sample.get("pixel_values"), part.counts.get("image")
    if pixels is None or pixels.dim() != 4 or part.crosses or part.queries != "image" or not count:
        return None
    high, wide = pixels.shape[-2:]
    fits = [side for side in STRIDES if ceil(high / side) * ceil(wide / side) == count]
    return Patches((fits[0], fits[0]), (high, wide), 0, up=True) if len(fits) == 1 else None


def _placed(hf: Any, part: Part, guess: Patches, sample: Mapping[str, Tensor]) -> Patches | None:
    height, width = guess.size
    shape = sample["pixel_values"].shape
    # crops are pictures too, and so are frames that the tower sees one by one
    plain = sample["pixel_values"].reshape(-1, *shape[1 if guess.depth else -3 :])
    frames, rows, columns = guess.place(plain).shape
    first, last = slice(0, max(guess.depth, 1)), slice(-max(guess.depth, 1), None)
    top, bottom = slice(0, height), slice((rows - 1) * height, rows * height)
    left, right = slice(0, width), slice((columns - 1) * width, columns * width)
    count = frames * rows * columns
    corners = [0, columns - 1, count - 1]
    changed = [plain, plain + 1]
    for frame, high, wide in ((first, top, left), (first, top, right), (last, bottom, right)):
        other = plain.clone()
        other[0].view(-1, *shape[-3:])[frame, :, high, wide] += 1
        changed.append(other)
    module = min(part.modules, key=part.modules.__getitem__)
    module = windows.block_around(hf, module) or module
    seen = [_entering(hf, module, {**sample, "pixel_values": given.view(shape)}) for given in changed]
    if any(each is None or each.dim() != 3 or len(each) != len(plain) for each in seen):
        return None
    before, *after = (each[0].double() for each in seen if each is not None)
    whole, *moved = ((each - before).abs().amax(-1) for each in after)
    places = (whole > 1e-6 * before.abs().max()).nonzero()[:, 0].tolist()
    if len(places) != count or places != list(range(places[0], places[0] + count)):
        return None
    if guess.up:
        in_order = _follows([each.view(rows, columns) for each in moved])
    else:
        in_order = [int(each.argmax()) - places[0] for each in moved] == corners
    if not in_order:
        return None
    prefix = places[0]
    suffix = len(before) - prefix - count
    return replace(
        guess, prefix=prefix, suffix=suffix, special=special_names(_tower(hf, module), prefix, suffix)
    )


def _follows(moved: list[Tensor]) -> bool:
    """Whether the middle of what moves goes to the right with the second picture, and down with the third.

    Convolutions blur: tokens far from a changed corner move too, and not always less than the nearest one.
    """
    middles = []
    for each in moved:  # [row, column]
        share = each / each.sum()
        middles.append(
            [float(share.sum(1 - axis) @ torch.arange(n).double()) for axis, n in enumerate(each.shape)]
        )
    (high, left), (top, right), (low, behind) = middles
    rows, columns = moved[0].shape
    goes_right = columns == 1 or right - left > abs(behind - right)
    return goes_right and (rows == 1 or low - top > abs(top - high))


def _tower(hf: Any, attention: nn.Module) -> nn.Module:
    """The smallest module around an attention module that also holds modules outside of the list of its blocks."""
    path = next(path for path, module in hf.named_modules() if module is attention)
    pieces = path.split(".")
    numbers = [place for place, piece in enumerate(pieces) if piece.isdigit()]
    # …encoder.layers.3.attention: the embeddings stand beside the encoder
    above = pieces[: max(numbers[0] - 2, 0)] if numbers else []
    return hf.get_submodule(".".join(above))


def _entering(hf: Any, module: nn.Module, given: Mapping[str, Tensor]) -> Tensor | None:
    """The hidden states [batch, position, d_model] that enter a module in one run."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(hidden_states(args, kwargs).detach().clone())
        raise _Seen

    try:
        with torch.no_grad(), context.discovering(), on(module, before=take):
            hf(**given)
    except _Seen:
        return found[0]
    return None
