"""`FURTHER`: inputs that stand beside a text, images or audio, each made from those that are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from headwater.lens.models.signature import FLOATS, image_token
from headwater.lens.samples.asked import BANDS, Asked, Inputs, random
from headwater.lens.samples.floats import FRAMES, STEPS, grids, patches

LENGTH = 24  # tokens


def _width(asked: Asked) -> int:
    return asked.number("hidden_size", "d_model", default=LENGTH)


def _frames(found: Inputs) -> Tensor:
    """Ones for the frames of the audio features: their longer axis that is not the batch."""
    features = next((t for n, t in found.items() if n in FLOATS), torch.ones(2, FRAMES))
    return torch.ones(2, FRAMES if FRAMES in features.shape else max(features.shape[1:]), dtype=torch.long)


def _boxes(asked: Asked, found: Inputs) -> Tensor:
    return torch.tensor([1, 2, 3, 4]).expand(*found["input_ids"].shape, 4).contiguous()


def _position_mask(asked: Asked, found: Inputs) -> Tensor:
    """True at the positions that an image takes; the text is made long enough for them."""
    count = asked.number("latent_query_num", default=LENGTH // 2)
    for name in ("input_ids", "attention_mask"):
        found[name] = torch.cat([torch.ones(2, count, dtype=torch.long), found[name]], 1)
    return (torch.arange(found["input_ids"].shape[1]) < count).expand(2, -1).contiguous()


def _marked(asked: Asked, found: Inputs) -> Tensor:
    """1 at the positions of an image's tokens."""
    return (found["input_ids"] == image_token(asked.hf)).long()


def _seen_tiles(asked: Asked, found: Inputs) -> Tensor:
    """Which pictures, or tiles of pictures, each position of the text sees: all."""
    before = found["pixel_values"].shape[1:-3]
    return torch.ones(*found["input_ids"].shape, *before, dtype=torch.long)


def _times(asked: Asked, steps: int) -> Tensor:
    """Features of the steps in time of a series."""
    return random(2, steps, asked.number("num_time_features", default=1))


FURTHER: Mapping[str, Callable[[Asked, Inputs], Tensor]] = {
    "bbox": _boxes,
    "image_embeds_position_mask": _position_mask,
    "mm_token_type_ids": _marked,
    "image_attention_mask": _seen_tiles,
    "cross_attention_mask": _seen_tiles,
    "qformer_input_ids": lambda asked, found: torch.arange(10).view(2, 5),
    "query_embeds": lambda asked, found: random(2, LENGTH, _width(asked)),
    "visual_feats": lambda asked, found: random(2, 6, asked.number("visual_feat_dim", default=LENGTH)),
    "visual_pos": lambda asked, found: random(2, 6, asked.number("visual_pos_dim", default=4)),
    "pixel_mask": lambda asked, found: torch.ones(2, *found["pixel_values"].shape[-2:], dtype=torch.long),
    "grid_thw": lambda asked, found: grids(),
    "hidden_states": lambda asked, found: patches(asked),
    "audio_mel": lambda asked, found: random(2, FRAMES, asked.number(*BANDS, default=80)),
    "audio_mel_mask": lambda asked, found: torch.zeros(2, FRAMES, dtype=torch.bool),
    "input_features_mask": lambda asked, found: _frames(found),
    "feature_attention_mask": lambda asked, found: _frames(found),
    "inputs": lambda asked, found: random(2, LENGTH, asked.number("d_model", "hidden_size", default=LENGTH)),
    "states": lambda asked, found: random(2, STEPS, asked.number("state_dim", default=4)),
    "actions": lambda asked, found: random(2, STEPS, asked.number("act_dim", default=4)),
    "rewards": lambda asked, found: random(2, STEPS, 1),
    "returns_to_go": lambda asked, found: random(2, STEPS, 1),
    "timesteps": lambda asked, found: torch.arange(STEPS).expand(2, -1).contiguous(),
    "past_time_features": lambda asked, found: _times(asked, found["past_values"].shape[1]),
    "future_time_features": lambda asked, found: _times(asked, asked.number("prediction_length", default=STEPS)),
    "past_observed_mask": lambda asked, found: torch.ones_like(found["past_values"]),
    "future_values": lambda asked, found: found["past_values"][:, : asked.number("prediction_length", default=STEPS)],
    "is_longer": lambda asked, found: torch.zeros(2, 1, dtype=torch.bool),
}  # fmt: skip
