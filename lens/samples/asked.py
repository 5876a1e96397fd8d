"""`Asked`: what the `forward` of a model asks for, and the sizes that its configurations name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from headwater.lens.models.signature import names, pair, vision_config

PIXELS = 64  # per side, where no configuration names a size
BANDS = (
    "num_mel_bins", "n_mels", "feature_size", "input_feat_size", "input_dim", "feat_dim", "input_feat_per_channel",
    "feature_projection_input_dim", "mel_bins",
)  # fmt: skip
PATCHES = 8  # of a small picture, per side: opening DINOv2 on its 37 × 37 patches took 20 times as long
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Asked:
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

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of pictures, from the tower's configuration or any other; None if none names it."""
        found = (pair(getattr(c, "image_size", None)) for c in (vision_config(self.hf), *self.configs))
        return next((size for size in found if size is not None), None)

    def side(self) -> tuple[int, int]:
        return self.size or (PIXELS, PIXELS)

    def channels(self) -> int:
        known = (getattr(vision_config(self.hf), field, None) for field in ("num_channels", "in_channels"))
        return next((n for n in known if isinstance(n, int)), self.number("num_channels", default=3))

    def sides(self) -> Iterator[tuple[int, int]]:
        """Sizes of pictures: few patches first, which models take that stretch their positions to any size."""
        config, full = self.hf.config, self.side()
        patch = pair(getattr(config, "patch_size", None))
        if patch and "input_ids" not in self.known and getattr(config, "window_size", None) is None:
            small = PATCHES * patch[0], PATCHES * patch[1]
            if small < full:
                yield small
        yield full

    def pinpoint(self) -> tuple[int, int] | None:
        """The first (height, width) of those that a picture is cut into crops for."""
        pinned = next((p for c in self.configs if (p := getattr(c, "image_grid_pinpoints", None))), None)
        return pair(pinned[0]) if isinstance(pinned, list | tuple) else None

    def placed(self, found: Inputs) -> Inputs:
        """The inputs on the model's device, floating-point ones in its dtype."""
        weight = next((t for t in self.hf.parameters() if t.is_floating_point()), torch.empty(0))
        return {
            n: t.to(weight.device, weight.dtype if t.is_floating_point() else None) for n, t in found.items()
        }


def random(*shape: int) -> Tensor:
    """The same numbers at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
