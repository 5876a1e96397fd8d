"""Recipes for models that read videos: attention is cut between frames, along places, or inside of frames."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from headwater.lens.edits.base import Edit
from headwater.lens.edits.pair_masks import MaskPairs
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.models.axes import axis
from headwater.lens.naming.grids import Grid
from headwater.lens.naming.heads import Heads, Layers
from headwater.lens.records.labels import labels

Hidden = Literal["other_frames", "same_places", "own_frame", "random"]


def space_time_knockout(
    model: HookedModel, prompt: Any, *, hide: Hidden = "other_frames", reach: int = 1, heads: Heads = "all",
    layers: Layers = "all", seed: int = 0, **more: Any,
) -> list[Edit]:  # fmt: skip
    """Patches of a video no longer see some others: those of other frames, of their own place, or of their own frame.

    `hide="other_frames"`: every patch of another frame. "same_places": in other frames, the patches at most `reach`
    rows and columns away from its own. "own_frame": the other patches of its frame. "random": as many other patches
    as "other_frames" hides, drawn for each patch with `seed`, a control. A patch always sees itself; tokens that are
    no patches see all and are seen by all. The softmax is taken over what is left. Ours. EditError where the prompt
    is no video, or where its rows have grids of different size.

    >>> import torch
    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model, film = hw.load(zoo.build("videomae")), torch.randn(1, 4, 3, 16, 16)
    >>> with model.edit(*hw.recipes.space_time_knockout(model, None, pixel_values=film)):
    ...     seen = model.record(pixel_values=film).pattern(0, 0)[0] > 0
    >>> seen.sum(-1).tolist()  # 2 frames of 2 × 2 patches
    [4, 4, 4, 4, 4, 4, 4, 4]
    """
    if hide not in get_args(Hidden):
        raise EditError(f"hide is one of {', '.join(get_args(Hidden))}; got {hide!r:.40}")
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:
        raise EditError(f"reach is a whole number of patches, 0 or more; got {reach!r:.40}")
    tokens = model.to_tokens(prompt, **more)
    part = model.parts[model.part_name]
    found = None if part.crosses else axis(part, part.queries, tokens)
    grids = () if found is None else labels(model, part, part.queries, tokens, found).grids
    films = {row[0] for row in grids if len(row) == 1 and row[0].frames > 1}
    if found is None or len(films) != 1 or any(len(row) != 1 for row in grids):
        raise EditError(
            f"the part {part.name!r} of {model.name} has no grid of several frames here; give videos of one size"
        )
    return [MaskPairs(shown(films.pop(), found.ids.shape[1], hide, reach, seed), heads=heads, layers=layers)]


def shown(grid: Grid, count: int, hide: Hidden, reach: int = 1, seed: int = 0) -> Bool[Tensor, "query key"]:
    """Which of `count` tokens each of them still sees."""
    frame, row, column = grid.coordinates().T
    own = frame[:, None] == frame
    if hide == "other_frames":
        hidden = ~own
    elif hide == "same_places":
        hidden = ~own & near(row, reach) & near(column, reach)
    elif hide == "own_frame":
        hidden = own & ~torch.eye(len(frame), dtype=torch.bool)
    else:
        noise = torch.rand(len(frame), len(frame), generator=torch.Generator().manual_seed(seed))
        most = (grid.frames - 1) * grid.rows * grid.columns
        hidden = torch.zeros_like(own).scatter_(1, noise.fill_diagonal_(2.0).argsort(1)[:, :most], True)
    seen = torch.ones(count, count, dtype=torch.bool)
    place = grid.tokens()
    seen[place[:, None], place] = ~hidden
    return seen


def near(along: Tensor, reach: int) -> Bool[Tensor, "patch patch"]:
    """Which patches are at most `reach` apart along one axis."""
    return (along[:, None] - along).abs() <= reach
