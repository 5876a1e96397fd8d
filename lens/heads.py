"""Heads as the field writes them: `5.1` is layer 5, head 1, both from zero."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.lens.errors import HeadError


class Head(NamedTuple):
    """One attention head; per query head, also under grouped queries."""

    layer: int
    head: int

    @classmethod
    def parse(cls, text: str | Head | tuple[int, int]) -> Head:
        if isinstance(text, tuple) and len(text) == 2 and all(isinstance(n, int) for n in text):
            return cls(*text)
        if isinstance(text, str) and (match := re.fullmatch(r"\s*(\d{1,5})\.(\d{1,5})\s*", text)):
            return cls(int(match[1]), int(match[2]))
        raise HeadError(f"a head is written 'layer.head', as in '5.1'; got {text!r}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


Heads = str | Head | Iterable["str | Head"]
Layers = str | int | Iterable[int]


def chosen(heads: Heads, layers: Layers, model_layers: list[int], n_heads: int) -> dict[int, Tensor]:
    """Head masks by layer, bool [head], of the layers in which anything is chosen.

    `heads` is "all", one head or several; `layers` limits "all" to some layers. Raises HeadError listing every head or
    layer that does not exist.
    """
    allowed = set(chosen_layers(layers, model_layers))
    if isinstance(heads, str) and heads == "all":
        return {layer: torch.ones(n_heads, dtype=torch.bool) for layer in sorted(allowed)}
    if not isinstance(heads, Iterable):
        raise HeadError(f"heads are 'all', '5.1' or a list of such; got {heads!r}")
    single = isinstance(heads, str | Head) or (
        isinstance(heads, tuple) and all(isinstance(n, int) for n in heads)
    )
    named = [Head.parse(h) for h in ([heads] if single else list(heads))]  # type: ignore[list-item]
    wrong = [str(h) for h in named if h.layer not in model_layers or h.head >= n_heads]
    if wrong:
        raise HeadError(
            f"no such head: {', '.join(wrong)}; the model has layers {_span(model_layers)} with heads 0 to "
            f"{n_heads - 1}"
        )
    masks: dict[int, Tensor] = {}
    for layer, head in named:
        if layer in allowed:
            masks.setdefault(layer, torch.zeros(n_heads, dtype=torch.bool))[head] = True
    return masks


def chosen_layers(layers: Layers, model_layers: list[int]) -> list[int]:
    """The layers named, each known to the model; HeadError lists those that are not."""
    if isinstance(layers, str):
        if layers == "all":
            return model_layers
        raise HeadError(f"layers are 'all', a number or a list of numbers; got {layers!r}")
    asked = [layers] if isinstance(layers, int) else list(layers)
    wrong = [n for n in asked if n not in model_layers]
    if wrong:
        raise HeadError(
            f"no attention in layer {', '.join(map(str, wrong))}; the model has layers {_span(model_layers)}"
        )
    return asked


def _span(layers: list[int]) -> str:
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
