"""How a stream ends: the norm behind the last block, the matrix that reads it, and the position that is read.

Of a language model these are known from its modules. Of a head of classes, a tower that is compared, and a head that
reads the norm's output times a number (T5) they are found in the run: the norm was given the stream, or one position of
it, and the matrix was given the norm's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks, norms
from headwater.lens.models.linear import linear
from headwater.lens.models.signature import compares
from headwater.lens.running.watching import Call


@dataclass(frozen=True, eq=False)
class Ending:
    """`norm`, and the matrix of `head` [output, d_model], which reads the norm's output times `scale`.

    `places` [row] are the positions that are read; None where every position has outputs of its own.
    """

    norm: nn.Module
    head: nn.Module
    scale: float = 1.0
    places: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The matrix with the scale, float64 [output, d_model]."""
        return self.scale * linear(self.head, "the head").weight.T.detach().double()

    @property
    def bias(self) -> Tensor | None:
        found = linear(self.head, "the head").bias
        return None if found is None else found.detach().double()

    def at(self, model: HookedModel, stream: Tensor, position: int) -> Tensor:
        """The position [row] of a stream [row, position, …] that is read: the asked one, or that of the outputs."""
        if self.places is None:
            return torch.full((len(stream),), position % stream.shape[1], device=stream.device)
        if position != -1:
            raise AnalysisError(
                f"the outputs of {model.name} are of a whole example, read at one position of its own; leave position "
                "out"
            )
        return self.places.to(stream.device)

    @torch.no_grad()
    def read(self, stream: Tensor) -> Tensor:
        """What the head makes of a stream, [..., output]."""
        normed = self.norm(stream)
        return self.head(normed if self.scale == 1.0 else self.scale * normed)


def at(vectors: Tensor, places: Tensor) -> Tensor:
    """Vectors [row, position, …] at one position of each row, [row, …]."""
    return vectors[torch.arange(len(vectors), device=vectors.device), places.to(vectors.device)]


def unembedding(model: HookedModel) -> tuple[nn.Module, Any] | None:
    """The final norm and the language head that reads it, where this part's stream ends in them."""
    main = next(iter(model.parts))
    if not model.has_lm_head or (model.part_name != main and main not in model.beside):
        return None
    norm, head = blocks.final_norm(model), model.hf.get_output_embeddings()
    return None if norm is None or head is None else (norm, head)


def ends(model: HookedModel) -> list[nn.Module]:
    """The modules outside of all blocks without modules inside, whose calls `ending` reads."""
    blocks_of = {model.hf.get_submodule(block.path) for part in model.parts.values() for block in part.stack}
    inside = {module for block in blocks_of for module in block.modules()}
    return [m for m in model.hf.modules() if m not in inside and not any(True for _ in m.children())]


def ending(model: HookedModel, last: Tensor, outputs: Tensor, calls: Sequence[Call]) -> Ending:
    """The end of the stream `last` [row, position, d_model] of a run; AnalysisError where none is known.

    `outputs` are the run's logits of tokens or classes, or similarities, and `calls` those of the modules in `ends`.
    """
    if (known := unembedding(model)) is not None:
        return Ending(*known)
    for normed in calls:
        if (
            normed.args
            and isinstance(normed.args[0], Tensor)
            and (read := _rows(normed.given, last))
            and _is_norm(normed)
        ):
            for call in calls:
                if (
                    call is not normed
                    and isinstance(call.module, nn.Linear)
                    and _is_last(model, call, outputs)
                ):
                    found = _reads(call.given, normed.output)
                    if found is not None:
                        places = found[1] if read[0] is None else read[0]
                        places = _picked(call.output, outputs) if places is None else places
                        return Ending(normed.module, call.module, found[0], places)
    direct = (
        "what it writes reaches them through other layers"
        if model.part_name != next(iter(model.parts))
        else ""
    )
    direct = direct or "no norm of its last stream is read by a head that is one matrix"
    raise AnalysisError(
        f"the outputs of {model.name} can not be read off the stream of its {model.part_name}: {direct}; use patch"
    )


def _rows(given: Tensor, stream: Tensor) -> tuple[Tensor | None] | None:
    """Where in the stream the vectors stand that a module was given: (None,) for all, ([row],) for one of each row."""
    if given.shape == stream.shape and torch.equal(given.double(), stream.double()):
        return (None,)
    if given.dim() == 2 and given.shape == (len(stream), stream.shape[-1]):
        same = (given[:, None].double() == stream.double()).all(-1)
        return (same.int().argmax(1),) if same.any(1).all() else None
    return None


def _is_norm(call: Call) -> bool:
    return call.output.shape == call.given.shape and norms.is_norm(call.module, call.given, call.output)


def _reads(given: Tensor, normed: Tensor) -> tuple[float, Tensor | None] | None:
    """The factor and the positions of a norm's output that a matrix was given; None if it was given something else."""
    if (found := _rows(given, normed)) is not None:
        return 1.0, found[0]
    if given.shape != normed.shape:
        return None
    factor = float((given.double() * normed.double()).sum() / normed.double().square().sum().clamp_min(1e-30))
    close = torch.allclose(given, factor * normed, rtol=1e-4, atol=1e-6 * float(given.abs().max()))
    return (factor, None) if close else None


def _is_last(model: HookedModel, call: Call, outputs: Tensor) -> bool:
    """Whether what a matrix gave are the model's outputs, or an embedding that is compared."""
    if compares(model.hf):
        return True
    return call.output.shape[-1:] == outputs.shape[-1:] and (
        call.output.shape == outputs.shape or _picked(call.output, outputs) is not None
    )


def _picked(given: Tensor, outputs: Tensor) -> Tensor | None:
    """The position of each row whose logits are the outputs [row, class]."""
    if outputs.dim() != 2 or given.dim() != 3:
        return None
    same = (given.double() == outputs[:, None].double()).all(-1)
    return same.int().argmax(1) if same.any(1).all() else None
