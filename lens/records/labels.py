"""`labels`: what each token on an axis is called, and which of them are patches of a picture.

Patches are "row,column", or "frame,row,column" in a video. Tokens that a picture takes in a text are
"<image> row,column" where each is one patch or a square of them, "<image> query 5" where learned queries sum the
picture up, and "<image> #5" where their places are not known. A text with several pictures counts them from 1:
"<image 2> 0,3". A picture that is read in crops too (LLaVA-NeXT) has "<image> detail 4,7" on the grid of these.
Positions of a sound are named by the second at which they begin, where the model's processor says how it is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.lens.models.axes import TEXTS
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Part
from headwater.lens.models.signature import markers, pair, vision_config
from headwater.lens.naming.grids import Grid, Grids
from headwater.lens.naming.measured import Measured
from headwater.lens.naming.tokens import Tokens

RESAMPLER = re.compile(r"resampler|q_?former|perceiver|abstractor", re.IGNORECASE)
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Labels(NamedTuple):
    """`strings` by batch row, and the pictures of each row."""

    strings: list[list[str]]
    grids: Grids


class Picture(NamedTuple):
    """What one picture is in a text: the names of its tokens, and its grids. `start` counts from its first token."""

    names: list[str]
    grids: tuple[Grid, ...] = ()

    @classmethod
    def of(cls, grid: Grid, names: tuple[str, ...] = ()) -> Picture:
        """One grid; `names` are those of the tokens in front of it and behind it."""
        return cls([*names[: grid.start], *grid.names(), *names[grid.start :]], (grid,))

    @classmethod
    def unknown(cls, count: int, mark: str = "#") -> Picture:
        return cls([f"{mark}{i}" for i in range(count)])


def labels(model: Opened, part: Part, side: str, found: Tokens, on_axis: Tokens) -> Labels:
    """The labels of the tokens `on_axis`, which stand on the axis `side` of a part, for the inputs `found`."""
    batch, count = on_axis.ids.shape
    named = found.named if isinstance(found, Measured) else {}
    if (own := named.get((part.name, "queries" if side == part.queries else "keys"))) is not None:
        return Labels([list(own.strings)] * batch, (() if own.grid is None else (own.grid,),) * batch)
    if side in TEXTS and "inputs_embeds" in found.more:
        return Labels([[f"vector {i}" for i in range(count)]] * batch, ((),) * batch)
    if side in TEXTS:
        return _of_text(model, found, on_axis)
    if side == "image" and (given := found.more.get("flattened_patches")) is not None:
        return _flattened(given[..., :2].long() - 1)
    names, grids = _of_pictures(model, part, side, found, count) or ([], ())
    if side == "audio" and (seconds := _seconds(model, part, found)):
        names = [f"{i * seconds:.2f} s" for i in range(count)]
    if not names:
        mark = "query " if side == "query" else "#"
        names = [f"{mark}{i}" for i in range(count)]
    return Labels([names] * batch, (grids,) * batch)


def _flattened(places: Tensor) -> Labels:
    """Patches [image, patch, (row, column)] that come with their places (Pix2Struct); padding is -1."""
    sizes = [(each.amax(0) + 1).tolist() for each in places]
    grids = [Grid(0, 1, rows, columns, columns) for rows, columns in sizes]
    count = places.shape[1]
    known = [
        grid.end <= count and each[: grid.end].tolist() == grid.coordinates()[:, 1:].tolist()
        for grid, each in zip(grids, places, strict=True)
    ]
    names = [
        [*(grid.names() if held else ()), *(f"#{n}" for n in range(grid.end if held else 0, count))]
        for grid, held in zip(grids, known, strict=True)
    ]
    return Labels(names, tuple((grid,) if held else () for grid, held in zip(grids, known, strict=True)))


def _of_pictures(
    model: Opened, part: Part, side: str, found: Tokens, count: int
) -> tuple[list[str], tuple[Grid, ...]] | None:
    """Names and pictures of `count` tokens of a tower, or of what a text looks at; None where they are not known."""
    patches = model.patches if part.patches is None else part.patches
    pixels = next((found.more[name] for name in PIXELS.values() if name in found.more), None)
    if side == "image" and not part.crosses and (grids := _packed(model, found, count)):
        return _several([grid.names() for grid in grids]), grids
    if patches is None or pixels is None or pixels.dim() < 4:
        return None
    grid = patches.place(pixels)
    if side == "image" and count == patches.count(pixels):
        return patches.names(grid), (grid,)
    size = patches.prefix + len(grid.tokens())  # without what fills a picture up
    if side == "query" or part.queries != "text" or not part.crosses or count % size:
        return None
    grids = tuple(grid._replace(start=tile * size + grid.start) for tile in range(count // size))
    return _several([patches.names(grid)[:size]] * len(grids)), grids


def _several(names: list[list[str]]) -> list[str]:
    """The names of all pictures; they count from 1 where there are several: "2: 0,3"."""
    return [f"{n}: {name}" if len(names) > 1 else name for n, each in enumerate(names, 1) for name in each]


def _seconds(model: Opened, part: Part, found: Tokens) -> float:
    """Seconds from one position of a sound to the next, by the model's processor; 0 where it does not say.

    A position is named by the second at which it begins.
    """
    maker = getattr(model.processor, "feature_extractor", model.processor)
    rate, hop = getattr(maker, "sampling_rate", None), getattr(maker, "hop_length", None)
    waves, features = (found.more.get(name) for name in ("input_values", "input_features"))
    if rate and waves is not None and waves.dim() == 2:
        strides = getattr(model.hf.config, "conv_stride", None)  # of the convolutions that read the wave
        return prod(strides) / rate if strides else 0.0
    mels = None if features is None or features.dim() != 3 else features.shape[1]
    if rate and hop and mels is not None and mels == getattr(maker, "feature_size", None):
        return part.stride * hop / rate
    return 0.0


def _packed(model: Opened, found: Tokens, count: int) -> tuple[Grid, ...]:
    """The pictures of a tower that reads the patches of all pictures in one row, square by square (Qwen2-VL).

    () where the patches are ordered by windows, or are not those of the given sizes.
    """
    sizes = next(
        (found.more[f"{kind}_grid_thw"] for kind in PIXELS if f"{kind}_grid_thw" in found.more), None
    )
    if sizes is None or any(hasattr(module, "get_window_index") for module in model.hf.modules()):
        return ()
    side, grids = int(getattr(vision_config(model.hf), "spatial_merge_size", 1)), []
    for frames, rows, columns in sizes.tolist():
        grids.append(Grid(grids[-1].end if grids else 0, frames, rows, columns, columns, side))
    return tuple(grids) if grids and grids[-1].end == count else ()


def _of_text(model: Opened, found: Tokens, text: Tokens) -> Labels:
    strings = [model.to_strings(row) for row in text.ids]
    beside = any(part.crosses and part.queries == "text" for part in model.parts.values())
    # where texts look at pictures through cross-attention, a picture's token only says that it is there
    known = {} if beside else {kind: token for kind, token in markers(model.hf).items() if kind in PIXELS}
    places = {kind: ((text.ids == token) & text.mask).cpu() for kind, token in known.items()}
    coming = {kind: _pictures(model, found, kind, int(there.sum())) for kind, there in places.items()}
    grids: list[tuple[Grid, ...]] = []
    for row, words in enumerate(strings):
        mine = [
            (kind, picture, columns)
            for kind, there in places.items()
            for picture, columns in _taken(coming[kind], there[row].nonzero()[:, 0].tolist())
        ]
        mine.sort(key=lambda each: each[2][0])
        pictures: list[Grid] = []
        several = {kind: sum(of == kind for of, *_ in mine) > 1 for kind in places}
        numbers = dict.fromkeys(places, 0)
        for kind, picture, columns in mine:
            numbers[kind] += 1
            mark = f"<{kind} {numbers[kind]}>" if several[kind] else f"<{kind}>"
            pictures += _placed(picture.grids, columns)
            for column, name in zip(columns, picture.names, strict=False):
                words[column] = f"{mark} {name}"
        grids.append(tuple(pictures))
    return Labels(strings, tuple(grids))


def _taken(coming: Iterator[Picture], columns: list[int]) -> Iterator[tuple[Picture, list[int]]]:
    """The pictures of one row, each with its columns."""
    while columns and (picture := next(coming, None)) is not None and picture.names:
        yield picture, columns[: len(picture.names)]
        columns = columns[len(picture.names) :]


def _placed(grids: tuple[Grid, ...], columns: list[int]) -> list[Grid]:
    """The grids on the axis, without those whose patches do not stand row by row at equal steps there."""
    found = []
    for grid in grids:
        if grid.end <= len(columns):
            own = [columns[token] for token in grid.tokens().tolist()]
            step = own[grid.columns] - own[0] if len(own) > grid.columns else grid.columns
            placed = grid._replace(start=own[0], step=step)
            found += [placed] if placed.tokens().tolist() == own else []
    return found


def _pictures(model: Opened, found: Tokens, kind: str, tokens: int) -> Iterator[Picture]:
    """The pictures of a batch in their order, which take this many tokens in all."""
    sizes, pixels = found.more.get(f"{kind}_grid_thw"), found.more.get(PIXELS[kind])
    if sizes is not None:
        merge = int(getattr(vision_config(model.hf), "spatial_merge_size", 1))
        shapes = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in sizes.tolist()]
        return iter([Picture.of(Grid(0, *shape, shape[2])) for shape in shapes])
    if pixels is None or pixels.dim() < 4 or kind != "image":
        return iter(())
    if "image_sizes" in found.more and hasattr(model.hf.config, "image_grid_pinpoints"):
        crops = [_in_crops(model, pixels, size) for size in found.more["image_sizes"].tolist()]
        if sum(len(picture.names) for picture in crops) == tokens:
            return iter(crops)
    number = int(torch.tensor(pixels.shape[:-3]).prod())
    if not tokens or tokens % number:  # crops that share tokens
        return iter([Picture.unknown(tokens // len(pixels))] * len(pixels))
    return iter([_picture(model, pixels, tokens // number)] * number)


def _picture(model: Opened, pixels: Tensor, count: int) -> Picture:
    """A picture that takes `count` tokens: its patches, with or without class token, or squares of patches."""
    if _resamples(model.hf):
        return Picture.unknown(count, "query ")
    rows, columns = _patches_of(model, pixels)
    patches = model.patches
    if patches is not None and count == patches.prefix + rows * columns + patches.suffix:
        return Picture.of(Grid(patches.prefix, 1, rows, columns, columns), tuple(patches.special))
    side = isqrt(rows * columns // count)
    if side and side * side * count == rows * columns and rows % side == columns % side == 0:
        return Picture.of(Grid(0, 1, rows // side, columns // side, columns // side))
    return Picture.unknown(count)


def _patches_of(model: Opened, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches; (0, 0) where their size is not known."""
    if model.patches is not None:
        return model.patches.grid_of(pixels)
    size = pair(getattr(vision_config(model.hf), "patch_size", None))
    return (0, 0) if size is None else (pixels.shape[-2] // size[0], pixels.shape[-1] // size[1])


def _in_crops(model: Opened, pixels: Tensor, size: list[int]) -> Picture:
    """A picture as LLaVA-NeXT reads it: small and whole, then its crops joined without their border, with a token at
    the end of each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    rows, columns = _patches_of(model, pixels)
    points, side = model.hf.config.image_grid_pinpoints, vision_config(model.hf).image_size
    down, across = get_anyres_image_grid_shape(size, points, side)
    joined = unpad_image(torch.empty(1, down * rows, across * columns), size)
    whole = Grid(0, 1, rows, columns, columns)
    detail = Grid(rows * columns, 1, joined.shape[1], joined.shape[2], joined.shape[2] + 1)
    lines = [f"detail {name}" for name in detail.names()]
    ends = [(*lines[n : n + detail.columns], "end of row") for n in range(0, len(lines), detail.columns)]
    return Picture([*whole.names(), *(name for line in ends for name in line)], (whole, detail))


def _resamples(hf: Any) -> bool:
    """Whether learned queries sum a picture up before it goes into the text."""
    return any(RESAMPLER.search(type(module).__name__) for module in hf.modules())
