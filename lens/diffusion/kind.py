"""`Diffusion`: how a module of diffusers is read. Its parts are `self`, `cross` and `joint` attention.

Calls of one kind whose pictures have one resolution form one part, in whatever block of the network they stand; where
there are several resolutions a part is called by that of the sample, "cross:8x8".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headwater.lens.diffusion.model import DiffusionModel
from headwater.lens.diffusion.picture import (
    IMAGE,
    WORDS,
    WORDS_FIRST,
    Axes,
    Kind as Name,
    grid_of,
    order_of_words,
    words_in,
)
from headwater.lens.foreign.divide import is_own, part_of, rank
from headwater.lens.foreign.meeting import AttentionCall, Key, Met
from headwater.lens.foreign.model import ForeignModel
from headwater.lens.foreign.module import ForeignModule
from headwater.lens.foreign.opening import Kind
from headwater.lens.models.parts import Part


class Diffusion(Kind):
    """The parts of a denoiser, and the names of their tokens."""

    model: type[ForeignModel] = DiffusionModel

    def __init__(self) -> None:
        self.joint = WORDS_FIRST
        self.kinds: dict[str, Name] = {}

    def divide(
        self, hf: ForeignModule, met: Mapping[Key, Met]
    ) -> tuple[dict[str, Part], dict[Key, AttentionCall]]:
        tensors = hf.arguments.tensors
        kinds = {key: _kind(hf, key, each) for key, each in met.items()}
        groups: dict[tuple[Any, ...], dict[Key, Met]] = {}
        for key, each in met.items():
            call = each.call
            groups.setdefault((kinds[key], len(call.q), call.q.shape[1], *call.lengths), {})[key] = each
        joint = next((key.path for key, kind in kinds.items() if kind == "joint"), None)
        if joint is not None:
            self.joint = order_of_words(hf, joint)
        sites: dict[Key, AttentionCall] = {}
        parts: dict[str, Part] = {}
        for about, group in groups.items():
            kind: Name = about[0]
            name = _name(about, list(groups), tensors)
            while name in parts:
                name += "'"
            made = {key: AttentionCall(key, kind != "cross") for key in group}
            sites |= made
            axes = {"self": (IMAGE, IMAGE), "cross": (IMAGE, WORDS), "joint": (self.joint, self.joint)}
            parts[name] = part_of(name, axes[kind], group, made)
            self.kinds[name] = kind
        return dict(sorted(parts.items(), key=lambda each: rank(each[1], met, hf.batch))), sites

    def names(self, hf: ForeignModule, parts: Mapping[str, Part]) -> Axes:
        return Axes(self.kinds, self.joint)


def _kind(hf: ForeignModule, key: Key, met: Met) -> Name:
    """Self-attention of the picture, attention to words, or words and picture in one row."""
    queries, keys = met.call.lengths
    told = getattr(hf.module.get_submodule(key.path), "is_cross_attention", None)
    if queries != keys or told or (told is None and not is_own(key, met)):
        return "cross"
    words, tensors = words_in(hf.arguments.tensors), hf.arguments.tensors
    alone = grid_of(tensors, queries) is not None
    return "joint" if words and not alone and grid_of(tensors, queries - words) else "self"


def _name(about: tuple[Any, ...], all_groups: list[tuple[Any, ...]], tensors: Mapping[str, Any]) -> str:
    """The kind; with the resolution where there are several of the kind."""
    kind, *_, queries, _ = about
    if sum(other[0] == kind for other in all_groups) == 1:
        return kind
    size = grid_of(tensors, queries - (words_in(tensors) if kind == "joint" else 0))
    return f"{kind}:{queries if size is None else f'{size[0]}x{size[1]}'}"
