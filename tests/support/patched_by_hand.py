"""A plain transformers model run with hooks by hand: the oracle of patching in any part of any model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import headwater as hw
from headwater.lens.loading import zoo
from headwater.lens.models import blocks
from headwater.lens.models.projections import projections

OUTPUTS = ("mlp", "cross", "value", "after")  # changed behind the module; the others in front of it


def _first(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def scored(name: str, out: Any) -> Tensor:
    if name == "clip":
        return torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
    row = out.logits[:, -1] if out.logits.dim() == 3 else out.logits
    return row[:, 2] - row[:, 1]


class ByHand:
    """The plain model, with the modules of each layer of a part by role, and runs with their inputs or outputs
    changed."""

    def __init__(self, name: str, part: str) -> None:
        self.name, self.plain = name, zoo.build(name)
        self.model = hw.load(copy.deepcopy(self.plain)).part(part)
        path = {module: path for path, module in self.model.hf.named_modules()}
        self.modules: dict[tuple[str, int], Any] = {}
        for layer in self.model.layers:
            known = blocks.block(self.model, layer)
            found = {
                "heads": projections(self.model, layer).output,
                "block": known.module,
                "mlp": known.mlp_out,
            }
            found |= {
                "norm1": known.norm1,
                "norm2": known.norm2,
                "value": projections(self.model, layer).value.module,
            }
            for other in self.model.beside:
                cross = blocks.block(self.model.part(other), layer)
                found |= {"cross": cross.attention, "cross_norm": cross.norm1}
                found["other"] = projections(self.model.part(other), layer).output
            known_in = {k: m for k, m in found.items() if m is not None}
            self.modules |= {(k, layer): self.plain.get_submodule(path[m]) for k, m in known_in.items()}
        self.sides: list[dict[str, Any]] = [{**zoo.inputs(name, seed)} for seed in (1, 2)]

    def pair(self) -> list[Any]:
        return [self.model.to_tokens(**side) for side in self.sides]

    def settings(self) -> dict[str, Any]:
        return {} if self.name == "clip" else {"answer": 2, "wrong": 1}

    def run(self, side: int, changes: dict[tuple[str, int], Callable[[Tensor], Tensor]]) -> Tensor:
        with contextlib.ExitStack() as stack, torch.no_grad():
            for (kind, layer), change in changes.items():
                module = self.modules[kind, layer]
                if kind in OUTPUTS:
                    handle = module.register_forward_hook(
                        lambda _, a, out, change=change: _first(out, change)
                    )
                else:
                    handle = module.register_forward_pre_hook(
                        lambda _, args, change=change: (change(args[0]), *args[1:])
                    )
                stack.callback(handle.remove)
            return scored(self.name, self.plain(**self.sides[side])).double()

    def seen(self, side: int) -> dict[tuple[str, int], Tensor]:
        found: dict[tuple[str, int], Tensor] = {}

        def keep(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
            return lambda given: found.setdefault(key, given.detach())

        self.run(side, {key: keep(key) for key in self.modules})
        return found


def put(where: Any, value: Tensor) -> Callable[[Tensor], Tensor]:
    def change(given: Tensor) -> Tensor:
        given = given.clone()
        given[where] = value[where]
        return given

    return change
