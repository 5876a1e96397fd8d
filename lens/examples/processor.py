"""The processor that lies in a model's folder, and what it makes of pictures and sounds.

A processor decides the numbers that a model reads: how a picture is scaled, cut and normalised, how a sound becomes a
spectrogram. A folder's own is used, or the one that the caller gives; there is no default. Its settings are data from
strangers: sizes are bounded before anything is made, and no code of the folder runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

from headwater.lens.errors import ModelError, PromptError
from headwater.lens.examples.settings_files import MOST_BYTES, PROCESSORS, check_processors
from headwater.lens.files import parse_json, read_text
from headwater.lens.media.sounds import Sound, sound

SIDES = (
    "height",
    "width",
    "shortest_edge",
    "longest_edge",
    "image_size",
    "crop_size",
    "max_height",
    "max_width",
)
MOST_SIDE, MOST = 2**13, 2**26  # pixels of a side; and of any number: pixels of a picture, samples of a sound
LONGEST_SHAPE = 200  # a side may be so many times the other: the shorter side is scaled to a fixed size


@dataclass(frozen=True)
class UnusableProcessor:
    """Stands for a folder's processor that can not be used; the model opens, and pictures and sounds are refused."""

    why: str


def processor_of(folder: Path) -> Any:
    """The processor in a model's folder, None where there is none; ModelError for one that can not be used."""
    found = [folder / name for name in PROCESSORS if (folder / name).is_file()]
    if not found:
        return None
    for file in found:
        content = parse_json(
            read_text(file, MOST_BYTES[file.name], ModelError, "a processor's settings are smaller"),
            str(file),
            ModelError,
        )
        if not isinstance(content, dict):
            raise ModelError(f"{file} must hold a JSON object; got {type(content).__name__}")
        _check(content, str(file))
    check_processors(folder)
    why = ""
    for kind, more in (
        (AutoProcessor, {}),
        (AutoImageProcessor, {"backend": "pil"}),
        (AutoFeatureExtractor, {}),
    ):
        try:
            return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **more)
        except Exception as error:  # each kind raises its own where the folder's is of another
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise ModelError(f"the processor in {folder} can not be used: {why:.200}; give load(…, processor=…)")


def _check(value: Any, where: str, pixels: bool = False) -> None:
    """ModelError for a number that would make a picture or a sound too large."""
    if isinstance(value, list):
        for each in value:
            _check(each, where, pixels)
    if not isinstance(value, dict):
        return
    pixels = (
        pixels or "merge_size" in value or "min_pixels" in value
    )  # its edges are numbers of pixels (Qwen-VL)
    for name, each in value.items():
        edge = name.endswith("_edge") and pixels
        most = MOST_SIDE if name in SIDES and not edge else MOST
        if isinstance(each, int | float) and not isinstance(each, bool) and not abs(each) <= most:
            raise ModelError(f"{where}: {name} is {each!r:.40}; the most is {most:,}")
        _check(each, where, pixels)


def of_pictures(processor: Any) -> Any:
    """The part of a processor that reads pictures; None without one."""
    inside = getattr(processor, "image_processor", None)
    return (
        inside
        if inside is not None
        else processor
        if hasattr(processor, "image_mean") or _reads(processor)
        else None
    )


def _reads(processor: Any) -> bool:
    names = getattr(processor, "model_input_names", None) or ()
    return not hasattr(processor, "decode") and any(str(name).startswith("pixel") for name in names)


def of_sounds(processor: Any) -> Any:
    """The part of a processor that reads sounds; None without one."""
    inside = getattr(processor, "feature_extractor", processor)
    return inside if isinstance(getattr(inside, "sampling_rate", None), int) else None


def pixels_of(processor: Any, pictures: Sequence[Image.Image], name: str) -> dict[str, Tensor]:
    """What the processor makes of RGB pictures, by transformers' names."""
    maker = _there(
        of_pictures(processor), processor,
        f"{name} came without a processor of pictures, so it is not known how it scales them; give "
        "hw.load(…, processor=…), or the numbers as pixel_values=",
    )  # fmt: skip
    for place, each in enumerate(pictures):
        if max(each.size) > LONGEST_SHAPE * min(each.size):
            raise PromptError(
                f"picture {place} has {each.size[0]} × {each.size[1]} pixels; one side may be {LONGEST_SHAPE} times "
                "the other at most: cut it"
            )
    if len(getattr(maker, "image_mean", None) or ()) == 1:  # a model of greys
        pictures = [each.convert("L") for each in pictures]
    with _told(f"the processor of {name}"):
        return dict(maker(images=list(pictures), return_tensors="pt"))


def features_of(processor: Any, sounds: Sequence[Sound], name: str) -> dict[str, Tensor]:
    """What the processor makes of sounds, by transformers' names."""
    maker = _there(
        of_sounds(processor), processor,
        f"{name} came without a processor of sounds, so it is not known how it hears them; give "
        "hw.load(…, processor=…), or the numbers as input_features= or input_values=",
    )  # fmt: skip
    rate = maker.sampling_rate
    read = [sound(each, rate, f"sound {place}") for place, each in enumerate(sounds)]
    raw = "input_values" in maker.model_input_names and maker.feature_size == 1  # samples, of unequal number
    with _told(f"the processor of {name}"):
        return dict(
            maker(read, sampling_rate=rate, return_tensors="pt", **({"padding": True} if raw else {}))
        )


def _there(maker: Any, processor: Any, without: str) -> Any:
    """The part of a processor; PromptError where it can not be used, or `without` where there is none."""
    if maker is None:
        raise PromptError(processor.why if isinstance(processor, UnusableProcessor) else without)
    return maker


@contextlib.contextmanager
def _told(who: str) -> Iterator[None]:
    """PromptError in one line for whatever a processor raises."""
    try:
        yield
    except PromptError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        raise PromptError(f"{who} can not read this: {type(error).__name__}: {told:.200}") from None
