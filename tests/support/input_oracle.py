"""Gradients and changes of a score at named modules of a plain transformers model, by hooks written out by hand.

The oracle shares no code with Headwater: the module of every family is named here, from transformers' source.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import headwater as hw
from headwater.lens.loading import zoo

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
class Case:
    """A family as Headwater reads it, its plain float64 twin, and its inputs: two rows, padded where they can be."""

    family: str
    model: hw.HookedModel
    twin: Any
    given: dict[str, Tensor]

    @property
    def tokens(self) -> Any:
        more: dict[str, Any] = {
            n: t for n, t in self.given.items() if n not in ("input_ids", "attention_mask")
        }
        return self.model.to_tokens(self.given.get("input_ids"), self.given.get("attention_mask"), **more)

    def places(self, sides: list[str]) -> list[Place]:
        return [Place.of(self.twin, self.family, side) for side in sides]


@functools.cache
def case(family: str) -> Case:
    """A family of the zoo, built once."""
    plain = zoo.build(family, seed=3)
    return Case(family, hw.load(copy.deepcopy(plain)), plain.double(), zoo.inputs(family, lengths=(11, 8)))


@dataclass
class Place:
    """Where the tokens of one side enter a plain model, as [row, token, feature]."""

    hf: Any
    path: str
    kind: str

    @classmethod
    def of(cls, hf: Any, family: str, side: str) -> Place:
        return cls(hf, *PLACES[family][side])

    def hook(self, change: Callable[[Tensor], Tensor]) -> Any:
        module = self.hf.get_submodule(self.path)
        if self.kind == "input":
            return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        if self.kind == "grid":
            return module.register_forward_hook(
                lambda _, __, out: change(out.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(out.shape)
            )
        return module.register_forward_hook(lambda _, __, out: change(out))

    def run(self, given: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> Any:
        """The output when `change` replaces the vectors [row, token, feature]."""
        handle = self.hook(change)
        try:
            return self.hf(**given)
        finally:
            handle.remove()

    def vectors(self, given: dict[str, Tensor]) -> Tensor:
        kept: list[Tensor] = []

        def keep(found: Tensor) -> Tensor:
            kept.append(found.clone())
            return found

        with torch.no_grad():
            self.run(given, keep)
        return kept[0]


def slopes_at(places: list[Place], given: dict[str, Tensor], score: Score, at: list[Tensor]) -> list[Tensor]:
    """∂s/∂x of each side, at given vectors of all."""
    leaves = [each.clone().requires_grad_() for each in at]
    return list(torch.autograd.grad(score(run_at(places, given, leaves)).sum(), leaves))


def run_at(places: list[Place], given: dict[str, Tensor], at: list[Tensor]) -> Any:
    """The output with these vectors [row, token, feature] at each side."""
    first, *more = places

    def outer(rest: list[Place], vectors: list[Tensor]) -> Any:
        if not rest:
            return first.run(given, lambda _: at[0])
        handle = rest[0].hook(lambda _: vectors[0])
        try:
            return outer(rest[1:], vectors[1:])
        finally:
            handle.remove()

    return outer(more, at[1:])


def single(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of the inputs of a family in float64, without padding."""
    one = {name: tensor[row : row + 1] for name, tensor in given.items()}
    if "attention_mask" in one:
        real = one["attention_mask"][0].bool()
        one |= {name: one[name][:, real] for name in ("input_ids", "attention_mask")}
    return {name: t.double() if t.is_floating_point() else t for name, t in one.items()}


def score_of(family: str, chosen: int | None = None) -> Score:
    """What is explained of a family when nothing is asked: the log-probability of its prediction, or how similar a text
    and its own picture are. `chosen` is the prediction, where it is that of another run."""

    def score(out: Any) -> Tensor:
        if family == "clip":
            return torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
        logits = out.logits if out.logits.dim() == 2 else out.logits[:, -1]
        picked = logits.argmax(-1) if chosen is None else torch.full((len(logits),), chosen)
        return logits.log_softmax(-1).gather(1, picked[:, None])[:, 0]

    return score


def predicted(family: str, out: Any) -> int | None:
    if family == "clip":
        return None
    logits = out.logits if out.logits.dim() == 2 else out.logits[:, -1]
    return int(logits[0].argmax())
