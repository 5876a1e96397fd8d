"""`picture`: a path, bytes, an image of PIL or an array as an RGB image, checked before it is decoded.

What a file is, is told by its content and not by its name. Size in bytes and in pixels is bounded before anything is
decoded. Of a moving picture the first frame is read. Transparency is dropped and palettes are looked up, as the image
processors of transformers do (`convert("RGB")`); the orientation that a camera wrote is applied.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.media.sources import as_array, content

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS = 2**26
MOST_TOGETHER = 2**28
OTHERS = {b"<svg": "an SVG drawing", b"<?xml": "an SVG or XML text", b"%PDF": "a PDF", b"%!PS": "PostScript",
          b"RIFF": "a sound or a film"}  # fmt: skip
Picture = Any  # a path, bytes, an image of PIL, or an array [height, width], [height, width, 3] or [3, height, width]


def is_picture(given: object) -> bool:
    """Whether this is an image of PIL, or an array of 8-bit numbers that can be one."""
    array = isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim in (2, 3)
    return isinstance(given, Image.Image) or array


def picture(given: Picture, what: str = "the picture") -> Image.Image:
    """The picture in mode RGB. PromptError, one line, for what is none, is too large, or is broken."""
    if isinstance(given, Image.Image):
        return _rgb(given, what)
    if isinstance(given, np.ndarray | Tensor):
        return Image.fromarray(_bytes(as_array(given), what), "RGB")
    if not isinstance(given, str | PathLike | bytes):
        raise PromptError(f"{what} is a path, bytes, an image of PIL or an array; got {type(given).__name__}")
    data, name = content(given, what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
        try:
            found = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise PromptError(
                f"{name} has more than {MOST_PIXELS:,} pixels; give a smaller picture"
            ) from None
        except Exception:  # a broken header may raise anything
            told = next(
                (f"{kind}, " for start, kind in OTHERS.items() if data.lstrip().startswith(start)), ""
            )
            raise PromptError(
                f"{name} is {told}no picture that is read; give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
            ) from None
    return _rgb(found, name)


def pictures(given: Iterable[tuple[str, Picture]]) -> list[Image.Image]:
    """Several named pictures in mode RGB, held in memory together; PromptError where they are too large for that."""
    found, together = [], 0
    for what, each in given:
        found.append(picture(each, what))
        together += found[-1].width * found[-1].height
        if together > MOST_TOGETHER:
            raise PromptError(
                f"{len(found)} pictures have more than {MOST_TOGETHER:,} pixels together; give fewer at a time"
            )
    return found


def _rgb(found: Image.Image, name: str) -> Image.Image:
    width, height = found.size
    if not 0 < width * height <= MOST_PIXELS:
        raise PromptError(
            f"{name} has {width} × {height} pixels; give a picture of at most {MOST_PIXELS:,} and of at least one"
        )
    try:
        found.load()
        upright = ImageOps.exif_transpose(found)
        if upright.mode == "F" or upright.mode.startswith("I"):
            upright = Image.fromarray(_grey(np.asarray(upright), upright.mode))
        return upright.convert("RGB")
    except Exception as error:  # a decoder may raise anything at broken data
        told = " ".join(str(error).split())
        raise PromptError(
            f"{name} is broken: {type(error).__name__}: {told:.200}; give a whole file"
        ) from None


def _grey(given: np.ndarray, mode: str) -> np.ndarray:
    """Brightness of many bits as 8 bits, where PIL would cut it off at 255. ValueError for numbers of no known scale.

    Floating-point numbers up to 1 are shares of full brightness; whole numbers up to 255 in 32 bits are 8 bits.
    """
    largest = given.max()
    if not (given >= 0).all() or not largest <= (255 if mode == "F" else 65535):  # NaN is no number either
        raise ValueError(
            f"its numbers of mode {mode} go from {given.min()} to {largest}, of which the scale is unknown"
        )
    if mode == "F":
        return np.rint(given * 255 if largest <= 1 else given).astype(np.uint8)
    return (given if mode == "I" and largest <= 255 else given // 257).astype(np.uint8)


def _bytes(given: np.ndarray, what: str) -> np.ndarray:
    """An array as 8-bit [height, width, 3]; numbers from 0 to 1 are shares of full brightness."""
    form = f"{what} is an array [height, width], [height, width, 3] or [3, height, width]"
    if given.ndim == 3 and given.shape[-1] not in (1, 3, 4) and given.shape[0] in (1, 3):
        given = np.moveaxis(given, 0, -1)
    if given.ndim == 2:
        given = given[..., None]
    if given.ndim != 3 or given.shape[-1] not in (1, 3, 4):
        raise PromptError(f"{form}; got {list(given.shape)}")
    if not 0 < given.shape[0] * given.shape[1] <= MOST_PIXELS:
        raise PromptError(
            f"{what} has {given.shape[1]} × {given.shape[0]} pixels; the most is {MOST_PIXELS:,}"
        )
    if given.dtype != np.uint8:
        if not np.issubdtype(given.dtype, np.floating) or not ((given >= 0) & (given <= 1)).all():
            raise PromptError(
                f"{form} of 8-bit numbers, or of numbers from 0 to 1; got {given.dtype}; give numbers that a processor "
                "has normalised as pixel_values="
            )
        given = np.rint(given * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(given[..., :3], (*given.shape[:2], 3)))
