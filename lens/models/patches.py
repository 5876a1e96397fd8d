"""`Patches`: where the patches of an image stand among the tokens of its tower, and how the tokens are named."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from headwater.lens.naming.grids import Grid

# parameters of image towers that are tokens of their own, with the names of these tokens
SPECIAL = {
    "cls_token": "CLS", "class_token": "CLS", "class_embedding": "CLS", "distillation_token": "DIST",
    "register_tokens": "REG", "detection_tokens": "DET",
}  # fmt: skip


@dataclass(frozen=True)
class Patches:
    """How an image becomes tokens: `prefix` tokens, then the patches, row by row, then `suffix` tokens.

    `size` and `image` are (height, width) in pixels, of a patch and of the image size in the config. `special` are the
    names of the tokens that are no patches: class token, registers, detection tokens. `depth` is the number of frames
    that a patch of a video spans; 0 where the tower reads pictures. `up` says that a piece of a patch at the border is
    one too, as behind convolutions.
    """

    size: tuple[int, int]
    image: tuple[int, int]
    prefix: int
    suffix: int = 0
    special: tuple[str, ...] = ()
    depth: int = 0
    up: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at the image size in the config."""
        return self.image[0] // self.size[0], self.image[1] // self.size[1]

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches in images [..., channel, height, width]."""
        high, wide = pixels.shape[-2:]
        if self.up:
            return ceil(high / self.size[0]), ceil(wide / self.size[1])
        return high // self.size[0], wide // self.size[1]

    def place(self, pixels: Tensor) -> Grid:
        """Where the patches of one of these images stand, or of a video [..., frame, channel, height, width]."""
        rows, columns = self.grid_of(pixels)
        frames = pixels.shape[-4] // self.depth if self.depth else 1
        return Grid(self.prefix, frames, rows, columns, columns)

    def count(self, pixels: Tensor) -> int:
        """How many tokens one of these images becomes."""
        return self.place(pixels).end + self.suffix

    def are_patches(self, count: int) -> Bool[Tensor, " position"]:
        """Which of `count` tokens are patches."""
        place = torch.arange(count)
        return (place >= self.prefix) & (place < count - self.suffix)

    def names(self, grid: Grid) -> list[str]:
        """ "[CLS]", "[REG1]" … for tokens that are no patches, "row,column" for the patches of `grid`."""
        return [*self.special[: self.prefix], *grid.names(), *self.special[self.prefix :]]


def special_names(tower: nn.Module, prefix: int, suffix: int) -> tuple[str, ...]:
    """The names of the tokens before and behind the patches, from the tower's own parameters in their order.

    Tokens are called "[REG1]" … where the parameters do not add up to them.
    """
    found: list[str] = []
    for path, weight in tower.named_parameters():
        kind = SPECIAL.get(path.rpartition(".")[2])
        if kind is not None:
            count = 1 if weight.dim() < 2 else weight.shape[-2]
            found += [f"[{kind}]"] if kind in ("CLS", "DIST") else [f"[{kind}{i + 1}]" for i in range(count)]
    if len(found) == prefix + suffix:
        return tuple(found)
    return tuple(f"[REG{i + 1}]" for i in range(prefix + suffix))
