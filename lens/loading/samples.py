"""`samples`: short arbitrary inputs for a model, made from the arguments of its `forward` and its configuration.

Two rows each; the second row of text has padding on the right. The likeliest input comes first. Which one a model
takes, only running it says: images may be videos, features may have their bands first or last.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from headwater.lens.errors import ModelError, nearest
from headwater.lens.models.signature import embedding, image_token, image_tokens, names, pair, vision_config

LENGTH, SAMPLES, FRAMES, PIXELS = (
    24,
    4000,
    64,
    64,
)  # tokens, audio samples, spectrogram frames, pixels per side
BANDS = (
    "num_mel_bins", "n_mels", "feature_size", "input_feat_size", "input_dim", "feat_dim", "input_feat_per_channel",
    "feature_projection_input_dim", "mel_bins",
)  # fmt: skip
PATCHES = 8  # of a small picture, per side: opening DINOv2 on its 37 × 37 patches took 20 times as long
Inputs = dict[str, Tensor]


def samples(hf: Any) -> Iterator[Inputs]:
    """Inputs to try, by their names in transformers. Those with images or audio come before those of text alone."""
    asked = _Asked(hf)
    seen: list[list[tuple[str, torch.Size]]] = []
    found: Inputs = {}
    for floats in (*_floats(asked), {}):
        for wanted in (asked.needed, asked.known):
            found = floats | _texts(asked, floats)
            for name in FURTHER.keys() & wanted - found.keys():
                with contextlib.suppress(KeyError):  # what it is made from is not there
                    found[name] = FURTHER[name](asked, found)
            shapes = [(name, tensor.shape) for name, tensor in found.items()]
            if found and shapes not in seen and asked.needed & FLOATS <= found.keys():
                seen.append(shapes)
                yield asked.placed(found)
    if set(found) >= {"input_ids", "attention_mask"}:
        yield from (asked.placed(form) for form in _forms(asked, found))


def _forms(asked: _Asked, text: Inputs) -> Iterator[Inputs]:
    """The same text in forms that heads of classifiers need."""
    end = getattr(asked.hf.config.get_text_config(), "eos_token_id", None)
    if isinstance(end, int):  # the model reads a text at its end-of-text token
        ids = text["input_ids"].masked_fill(text["input_ids"] == end, max(end - 1, 0))
        last = text["attention_mask"].sum(-1, keepdim=True) - 1
        yield text | {"input_ids": ids.scatter(1, last, end)}
    yield {name: given[:1] for name, given in text.items()}  # the model has no padding token
    yield {name: given[:, None] for name, given in text.items()}  # each row is one of several choices


def as_rows(sample: Inputs) -> Inputs:
    """The sample as attention sees it: choices [row, choice, position] are rows."""
    choices = "input_ids" in sample and sample["input_ids"].dim() == 3
    return {name: given.flatten(0, 1) for name, given in sample.items()} if choices else sample


def check_sample(hf: Any, given: Mapping[str, Any]) -> Inputs:
    """A user's sample as tensors on the model's device; ModelError names what is no input or no tensor."""
    known = inspect.signature(hf.forward).parameters
    if not isinstance(given, Mapping) or not given:
        raise ModelError(
            f"sample takes inputs by their names in transformers, as in {{'input_ids': …}}; got {given!r:.60}"
        )
    if unknown := [name for name in given if name not in known]:
        raise ModelError(
            f"{type(hf).__name__} reads no {unknown[0]!r}: {nearest(str(unknown[0]), names(hf))}"
        )
    found = {}
    for name, value in given.items():
        try:
            found[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ModelError(f"sample: {name} must be a tensor; got {type(value).__name__}") from None
    return _Asked(hf).placed(found)


def described(sample: Inputs) -> str:
    """ "input_ids [2, 24], attention_mask [2, 24]"."""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sample.items())


@dataclass(frozen=True)
class _Asked:
    """A model, and what its `forward` asks for."""

    hf: Any

    @cached_property
    def known(self) -> set[str]:
        return set(names(self.hf))

    @cached_property
    def needed(self) -> set[str]:
        """The arguments that have no default."""
        given = inspect.signature(self.hf.forward).parameters
        return {name for name in self.known if given[name].default is inspect.Parameter.empty}

    @cached_property
    def configs(self) -> list[PreTrainedConfig]:
        """The configuration and all inside it."""
        found = [self.hf.config]
        for config in found:
            found += [c for c in vars(config).values() if isinstance(c, PreTrainedConfig) and c not in found]
        return found

    def number(self, *fields: str, default: int) -> int:
        """The first of these fields that any configuration has."""
        values = (getattr(config, field, None) for field in fields for config in self.configs)
        return next((n for n in values if isinstance(n, int) and n > 0), default)

    def side(self) -> tuple[int, int]:
        return pair(getattr(vision_config(self.hf), "image_size", None)) or (PIXELS, PIXELS)

    def sides(self) -> Iterator[tuple[int, int]]:
        """Sizes of pictures: few patches first, which models take that stretch their positions to any size."""
        config, full = self.hf.config, self.side()
        patch = pair(getattr(config, "patch_size", None))
        if patch and "input_ids" not in self.known and getattr(config, "window_size", None) is None:
            small = PATCHES * patch[0], PATCHES * patch[1]
            if small < full:
                yield small
        yield full

    def placed(self, found: Inputs) -> Inputs:
        """The inputs on the model's device, floating-point ones in its dtype."""
        weight = next((t for t in self.hf.parameters() if t.is_floating_point()), torch.empty(0))
        return {
            n: t.to(weight.device, weight.dtype if t.is_floating_point() else None) for n, t in found.items()
        }


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _floats(asked: _Asked) -> Iterator[Inputs]:
    """Images or audio in each form that models take them in."""
    channels = getattr(vision_config(asked.hf), "num_channels", 3)
    sized = pair(getattr(vision_config(asked.hf), "image_size", None)) is not None
    bands = asked.number(*BANDS, default=80)
    if "pixel_values" in asked.known and (sized or "pixel_values" in asked.needed):
        if "grid_thw" in asked.needed:
            yield {"pixel_values": _patches(asked, {})}
        for side in asked.sides():
            yield {"pixel_values": _random(2, channels, *side)}
        yield {"pixel_values": _video(asked)}
    elif "pixel_values_videos" in asked.needed:
        yield {"pixel_values_videos": _video(asked)}
    elif "input_features" in asked.known:
        source = asked.number("max_source_positions", default=0)
        if source:
            yield {"input_features": _random(2, bands, 2 * source)}
        yield {"input_features": _random(2, FRAMES, bands)}
        yield {"input_features": _random(2, bands, FRAMES)}
    elif "input_values" in asked.known:
        yield {"input_values": _random(2, SAMPLES)}
        yield {"input_values": _random(2, 1, 2 * SAMPLES)}
        yield {"input_values": _random(2, asked.number("max_length", default=FRAMES), bands)}


def _video(asked: _Asked) -> Tensor:
    frames = asked.number("num_frames", "frames_per_clip", "num_image_with_embedding", default=2)
    return _random(2, frames, getattr(vision_config(asked.hf), "num_channels", 3), *asked.side())


def _texts(asked: _Asked, floats: Inputs) -> Inputs:
    table = embedding(asked.hf)
    vocab = asked.number("vocab_size", default=64) if table is None else table.num_embeddings
    wanted = asked.needed if table is None and FLOATS & asked.known else asked.known
    found = _text(asked, vocab, floats, "") if "input_ids" in wanted else {}
    if "decoder_input_ids" in wanted:
        found |= _text(asked, vocab, {}, "decoder_")
    return found


def _text(asked: _Asked, vocab: int, floats: Inputs, prefix: str) -> Inputs:
    text = asked.hf.config.get_text_config()
    limits = (getattr(text, field, None) for field in ("max_position_embeddings", "max_target_positions"))
    length = min(LENGTH, *(n for n in limits if isinstance(n, int) and n > 0), LENGTH)
    ids = (torch.arange(2 * length).view(2, -1) * 7919 + 5) % vocab
    marker = image_token(asked.hf)
    if marker is not None:
        ids = ids.masked_fill(ids == marker, (marker + 1) % vocab)
        if "pixel_values" in floats:
            pixels = asked.placed({"pixel_values": floats["pixel_values"][:1]})["pixel_values"]
            count = image_tokens(asked.hf, pixels) or asked.number("num_query_tokens", default=0)
            ids = torch.cat([ids[:, :2], torch.full((2, count), marker), ids[:, 2:]], 1)
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] - length // 3 :] = 0
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


# --- further inputs, each from those that are there already


def _patches(asked: _Asked, found: Inputs) -> Tensor:
    """Two images of 4 × 4 patches, [patch, numbers of a patch], as Qwen-VL takes them."""
    vision = vision_config(asked.hf)
    numbers = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
    side = asked.number("patch_size", default=14)
    return _random(32, numbers * asked.number("temporal_patch_size", default=1) * side**2)


def _width(asked: _Asked) -> int:
    return asked.number("hidden_size", "d_model", default=LENGTH)


def _frames(found: Inputs) -> Tensor:
    """Ones for the frames of the audio features: their longer axis that is not the batch."""
    features = next((t for n, t in found.items() if n in FLOATS), torch.ones(2, FRAMES))
    return torch.ones(2, FRAMES if FRAMES in features.shape else max(features.shape[1:]), dtype=torch.long)


def _boxes(asked: _Asked, found: Inputs) -> Tensor:
    return torch.tensor([1, 2, 3, 4]).expand(*found["input_ids"].shape, 4).contiguous()


def _position_mask(asked: _Asked, found: Inputs) -> Tensor:
    """True at the positions that an image takes; the text is made long enough for them."""
    count = asked.number("latent_query_num", default=LENGTH // 2)
    for name in ("input_ids", "attention_mask"):
        found[name] = torch.cat([torch.ones(2, count, dtype=torch.long), found[name]], 1)
    return (torch.arange(found["input_ids"].shape[1]) < count).expand(2, -1).contiguous()


FLOATS = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
FURTHER: Mapping[str, Callable[[_Asked, Inputs], Tensor]] = {
    "bbox": _boxes,
    "image_embeds_position_mask": _position_mask,
    "qformer_input_ids": lambda asked, found: torch.arange(10).view(2, 5),
    "query_embeds": lambda asked, found: _random(2, LENGTH, _width(asked)),
    "visual_feats": lambda asked, found: _random(2, 6, asked.number("visual_feat_dim", default=LENGTH)),
    "visual_pos": lambda asked, found: _random(2, 6, asked.number("visual_pos_dim", default=4)),
    "pixel_mask": lambda asked, found: torch.ones(2, *found["pixel_values"].shape[-2:], dtype=torch.long),
    "grid_thw": lambda asked, found: torch.tensor([[1, 4, 4], [1, 4, 4]]),
    "hidden_states": _patches,
    "audio_mel": lambda asked, found: _random(2, FRAMES, asked.number(*BANDS, default=80)),
    "audio_mel_mask": lambda asked, found: torch.zeros(2, FRAMES, dtype=torch.bool),
    "input_features_mask": lambda asked, found: _frames(found),
    "feature_attention_mask": lambda asked, found: _frames(found),
    "inputs": lambda asked, found: _random(2, LENGTH, _width(asked)),
    "states": lambda asked, found: _random(2, 8, asked.number("state_dim", default=4)),
    "actions": lambda asked, found: _random(2, 8, asked.number("act_dim", default=4)),
    "rewards": lambda asked, found: _random(2, 8, 1),
    "returns_to_go": lambda asked, found: _random(2, 8, 1),
    "timesteps": lambda asked, found: torch.arange(8).expand(2, -1).contiguous(),
}
