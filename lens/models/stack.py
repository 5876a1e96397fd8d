"""What every block of a stack does, in order: attention that is read, other mixers of positions, MLPs.

A mixer is a module that carries information from one position to another and that no attention map covers: linear
attention, a gated delta rule, a state space, a short convolution, attention outside of the interface. The list is made
when a model is opened (loading/stacks.py), from what the modules do in a run and not from their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["attention", "mixer", "mlp"]


@dataclass(frozen=True)
class Step:
    """One module of a block: `path` in the transformers model, `name` of its class.

    "attention": a part of the model reads its maps; "mixer": it mixes positions and has no map; "mlp": it works on each
    position by itself.
    """

    kind: Kind
    path: str
    name: str


@dataclass(frozen=True)
class Mixer:
    """A mixer without an attention map, in block `layer`."""

    layer: int
    path: str
    name: str


@dataclass(frozen=True)
class StackBlock:
    """One block: its `layer` number, which is that of its attention where it has one, its `path`, its `steps`, and the
    number of `axes` of the hidden state that it hands on, 3 for [batch, position, d_model] (0: not known)."""

    layer: int
    path: str
    steps: tuple[Step, ...]
    axes: int = 0

    @property
    def beside(self) -> tuple[Step, ...]:
        """The mixers and MLPs, without what mixes positions inside of an attention module or in the block itself."""
        attending = {step.path for step in self.steps if step.kind == "attention"}
        holding = {self.path, *attending} if attending else set()
        return tuple(s for s in self.steps if s.kind != "attention" and s.path not in holding)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        return tuple(Mixer(self.layer, step.path, step.name) for step in self.steps if step.kind == "mixer")


def entry(hf: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The block of an attention module: the entry of the innermost numbered list that holds it; None without one."""
    path = next(name for name, module in hf.named_modules() if module is attention)
    steps = path.split(".")
    place = next((n for n in range(len(steps) - 1, 0, -1) if steps[n].isdigit()), None)
    if place is None or place + 1 >= len(steps):
        return None
    return hf.get_submodule(".".join(steps[: place + 1]))


def block_around(hf: nn.Module, stack: Iterable[StackBlock], attention: nn.Module) -> nn.Module | None:
    """The block of an attention module: as the stack lists it, also where it holds a list of its own (T5)."""
    inner = entry(hf, attention)
    if inner is None:
        return None
    blocks = (hf.get_submodule(block.path) for block in stack)
    return next((block for block in blocks if inner in set(block.modules())), inner)


def mixers_of(stack: Iterable[StackBlock]) -> tuple[Mixer, ...]:
    """All mixers of a stack, in order."""
    return tuple(mixer for block in stack for mixer in block.mixers)


def pattern(path: str) -> str:
    """A module's path with "*" for every number, so that all layers of a stack have the same."""
    return ".".join("*" if piece.isdigit() else piece for piece in path.split("."))


def named(mixers: Sequence[Mixer]) -> list[str]:
    """One text per kind of mixer: "JambaMambaMixer in layers 0 and 2 (model.layers.*.mamba)".

    >>> named([Mixer(0, "layers.0.mamba", "Mamba"), Mixer(1, "layers.1.mamba", "Mamba")])
    ['Mamba in layers 0 and 1 (layers.*.mamba)']
    """
    kinds: dict[tuple[str, str], list[int]] = {}
    for mixer in mixers:
        kinds.setdefault((mixer.name, pattern(mixer.path)), []).append(mixer.layer)
    return [f"{name} in {_layers(layers)} ({where})" for (name, where), layers in kinds.items()]


def _layers(numbers: Iterable[int]) -> str:
    """ "layer 3", "layers 0 and 2", "layers 0-2, 4 and 6"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    runs = [
        piece
        for run in found
        for piece in ([str(n) for n in run] if len(run) < 3 else [f"{run[0]}-{run[-1]}"])
    ]
    if len(runs) == 1:
        return f"layer{'s' if '-' in runs[0] else ''} {runs[0]}"
    return f"layers {', '.join(runs[:-1])} and {runs[-1]}"
