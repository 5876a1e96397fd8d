"""Gradients and changes of a score at named modules of a plain transformers model, by hooks written out by hand.

It shares no code with Headwater: the module of every family is named here, from transformers' source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Any], Tensor]  # the model's output → one number per row

# (module, what is met there: its output, its output with features in front of a grid, or its input)
PLACES = {
    "vit_classifier": {"vision": ("vit.embeddings.patch_embeddings.projection", "grid")},
    "clip": {
        "vision": ("vision_model.embeddings.patch_embedding", "grid"),
        "text": ("text_model.embeddings.token_embedding", "output"),
    },
    "llava": {
        "vision": ("model.vision_tower.embeddings.patch_embedding", "grid"),
        "text": ("model.language_model.layers.0", "input"),
    },
    "t5": {"encoder": ("encoder.embed_tokens", "output"), "decoder": ("decoder.embed_tokens", "output")},
    "bart": {
        "encoder": ("model.encoder.embed_tokens", "output"),
        "decoder": ("model.decoder.embed_tokens", "output"),
    },
    "whisper": {
        "encoder": ("model.encoder.layers.0", "input"),
        "decoder": ("model.decoder.embed_tokens", "output"),
    },
    "wav2vec2": {"audio": ("wav2vec2.encoder.layers.0", "input")},
}


@dataclass
class Place:
    """Where the tokens of one side enter a plain model, as [row, token, feature]."""

    hf: Any
    path: str
    kind: str

    @classmethod
    def of(cls, hf: Any, family: str, side: str) -> Place:
        return cls(hf, *PLACES[family][side])

    def run(self, given: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> Any:
        """The output when `change` replaces the vectors [row, token, feature]."""
        module = self.hf.get_submodule(self.path)
        if self.kind == "input":
            handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        elif self.kind == "grid":
            handle = module.register_forward_hook(
                lambda _, __, out: change(out.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(out.shape)
            )
        else:
            handle = module.register_forward_hook(lambda _, __, out: change(out))
        try:
            return self.hf(**given)
        finally:
            handle.remove()

    def vectors(self, given: dict[str, Tensor]) -> Tensor:
        kept: list[Tensor] = []
        with torch.no_grad():
            self.run(given, lambda found: kept.append(found.clone()) or found)
        return kept[0]

    def slope(self, given: dict[str, Tensor], score: Score, at: Tensor | None = None) -> Tensor:
        """∂s/∂x [row, token, feature], at the vectors of the run or at others."""
        leaf = (self.vectors(given) if at is None else at).clone().requires_grad_()
        return torch.autograd.grad(score(self.run(given, lambda _: leaf)).sum(), leaf)[0]


def slopes_at(places: list[Place], given: dict[str, Tensor], score: Score, at: list[Tensor]) -> list[Tensor]:
    """∂s/∂x of several sides at once, at given vectors."""
    if len(places) == 1:
        return [places[0].slope(given, score, at[0])]
    one, two = places
    leaves = [each.clone().requires_grad_() for each in at]
    inner = Place(two.hf, two.path, two.kind)
    first = one.hf.get_submodule(one.path)
    if one.kind == "input":
        handle = first.register_forward_pre_hook(lambda _, args: (leaves[0], *args[1:]))
    else:
        handle = first.register_forward_hook(lambda _, __, out: leaves[0])
    try:
        found = score(inner.run(given, lambda _: leaves[1])).sum()
    finally:
        handle.remove()
    return list(torch.autograd.grad(found, leaves))
