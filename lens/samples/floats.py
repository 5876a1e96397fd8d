"""`floats`: images, videos, audio and series in each form that models take them in, the likeliest first.

Pictures stand alone, in crops with their sizes, in tiles, or as patches that are packed behind one another; which form
a model takes shows in the other arguments of its `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headwater.lens.models.signature import image_token
from headwater.lens.samples.asked import BANDS, Asked, Inputs, random

SAMPLES, FRAMES = 4000, 64  # of audio, and of a spectrogram
GRID = 4  # patches per side of packed pictures
STEPS = 8  # of a series
LENGTHS = ("num_frames", "frames_per_clip", "num_image_with_embedding")  # of a video


def floats(asked: Asked) -> Iterator[Inputs]:
    """Two examples each."""
    if "flattened_patches" in asked.known:
        yield {"flattened_patches": _flattened(asked)}
    marked = image_token(asked.hf) is not None
    if "pixel_values" in asked.known and (
        asked.size or "pixel_values" in asked.needed or _packed(asked) or marked
    ):
        yield from _pictures(asked)
    elif "pixel_values_videos" in asked.needed:
        yield {"pixel_values_videos": video(asked)}
    elif "past_values" in asked.known:
        yield {"past_values": _series(asked)}
    else:
        yield from _sounds(asked)


def _pictures(asked: Asked) -> Iterator[Inputs]:
    channels, (height, width) = asked.channels(), asked.side()
    if "grid_thw" in asked.needed:
        yield {"pixel_values": patches(asked), "grid_thw": grids()}
    if "image_grid_thw" in asked.known:
        yield {"pixel_values": patches(asked), "image_grid_thw": grids()}
    if "spatial_shapes" in asked.known:  # SigLIP 2 in its form for any proportions
        count = asked.number("num_patches", default=GRID**2)
        side = max(int(count**0.5), 1)
        yield {
            "pixel_values": random(2, side**2, channels * asked.number("patch_size", default=16) ** 2),
            "spatial_shapes": torch.tensor([[side, side]] * 2),
            "pixel_attention_mask": torch.ones(2, side**2, dtype=torch.long),
        }
    if "aspect_ratio_ids" in asked.known:  # Mllama: tiles of each picture
        tiles = asked.number("max_num_tiles", default=4)
        yield {
            "pixel_values": random(2, 1, tiles, channels, height, width),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
        }
    if (
        "image_sizes" in asked.known and (pinned := asked.pinpoint()) is not None
    ):  # LLaVA-NeXT: a whole and its crops
        crops = 1 + (pinned[0] // height) * (pinned[1] // width)
        yield {
            "pixel_values": random(2, crops, channels, height, width),
            "image_sizes": torch.tensor([pinned] * 2),
        }
    for side in asked.sides():
        yield {"pixel_values": random(2, channels, *side)}
    several = [random(2, 1, channels, height, width), video(asked)]  # pictures, or frames
    for given in reversed(several) if asked.number(*LENGTHS, default=0) else several:
        yield {"pixel_values": given}


def _sounds(asked: Asked) -> Iterator[Inputs]:
    bands = asked.number(*BANDS, default=80)
    if "input_features" in asked.known:
        source, side = (asked.number(n, default=0) for n in ("max_source_positions", "spec_size"))
        if side:  # CLAP folds a spectrogram into a square
            yield {"input_features": random(2, 1, side * max(side // bands, 1), bands)}
        if source:
            yield {"input_features": random(2, bands, 2 * source)}
        yield {"input_features": random(2, FRAMES, bands)}
        yield {"input_features": random(2, bands, FRAMES)}
    if "input_values" in asked.known:
        yield {"input_values": random(2, SAMPLES)}
        yield {"input_values": random(2, 1, 2 * SAMPLES)}
        yield {"input_values": random(2, asked.number("max_length", default=FRAMES), bands)}


def _packed(asked: Asked) -> bool:
    return bool({"grid_thw", "image_grid_thw", "spatial_shapes"} & asked.known)


def patches(asked: Asked) -> Tensor:
    """Two images of `GRID` × `GRID` patches, [patch, numbers of a patch], as Qwen-VL takes them."""
    side = asked.number("patch_size", default=14)
    depth = asked.number("temporal_patch_size", default=1)
    return random(2 * GRID**2, asked.channels() * depth * side**2)


def grids() -> Tensor:
    """(frames, rows, columns) of the patches of two images."""
    return torch.tensor([[1, GRID, GRID]] * 2)


def video(asked: Asked) -> Tensor:
    frames = asked.number(*LENGTHS, default=2)
    return random(2, frames, asked.channels(), *asked.side())


def _flattened(asked: Asked) -> Tensor:
    """Patches with their row and column in front, as Pix2Struct takes them."""
    numbers = random(2, GRID**2, asked.number("patch_embed_hidden_size", default=768))
    places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)) + 1
    return torch.cat([places.expand(2, -1, -1).to(numbers), numbers], 2)


def _series(asked: Asked) -> Tensor:
    """Values of one or several series, [example, step] or [example, step, channel]."""
    lags = getattr(asked.hf.config, "lags_sequence", None) or [0]
    length = asked.number("context_length", default=STEPS) + max(lags)
    inputs = asked.number("num_input_channels", "input_size", default=1)
    many = inputs > 1 or hasattr(asked.hf.config, "num_input_channels")
    return random(2, length, inputs) if many else random(2, length)
