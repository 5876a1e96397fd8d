"""Models that compute attention by themselves (GPT-J, DeBERTa, OpenAI GPT, BLIP …): read, never edited.

They do not use transformers' attention interface. With `output_attentions` their eager code returns dense weights,
which are taken one layer at a time (loading/dense_weights.py finds their modules). A layer's weights become an
`AttentionMap` with the score bias log(weights). Memory: queries × keys numbers for one layer, and for every layer if
the record keeps maps. Values and head outputs are not available.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.attention.module_hooks import on
from headwater.lens.errors import ModelError
from headwater.lens.models.axes import TEXTS, axis
from headwater.lens.models.inputs import arguments
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Part
from headwater.lens.naming.tokens import Tokens

READ_ONLY = "its own code computes its attention, so it is read-only (dense weights from output_attentions)"


@dataclass(frozen=True)
class Real:
    """Which queries and which keys are real, bool [batch, position]; None: all, however many there are."""

    queries: Tensor | None
    keys: Tensor | None

    def fault(self, weights: Tensor) -> str:
        """Why these are no softmax over the real keys, as a clause; "" if they are."""
        shape = list(weights.shape)
        sizes: list[Any] = ["batch", "heads", "queries", "keys"]
        for place, side in ((2, self.queries), (3, self.keys)):
            if side is not None:
                sizes[0], sizes[place] = side.shape
        if len(shape) != 4 or any(isinstance(n, int) and n != m for n, m in zip(sizes, shape, strict=True)):
            expected = ", ".join(str(n) for n in sizes)
            return f"the shape is {shape}, where [{expected}] is expected"
        rows = weights.detach().float()
        shut = None if self.keys is None else ~self.keys.to(rows.device)[:, None, None, :]
        hidden = torch.zeros_like(rows) if shut is None else rows * shut
        rows, hidden = rows.transpose(1, 2), hidden.transpose(1, 2)
        if self.queries is not None:
            real = self.queries.to(rows.device)
            rows, hidden = rows[real], hidden[real]
        sums = rows.sum(-1)
        if not (sums - 1).abs().max() <= 1e-3 or bool((rows < 0).any()):
            least, most = float(sums.min()), float(sums.max())
            return f"the rows are no softmax over the real tokens: they sum to {least:.3g} … {most:.3g}"
        return (
            "the rows are no softmax over the real tokens: padding has weight" if hidden.max() > 1e-6 else ""
        )


def asking(hf: Any) -> dict[str, bool]:
    known = inspect.signature(hf.forward).parameters
    wanted = {"output_attentions": True} if "output_attentions" in known or "kwargs" in known else {}
    return wanted | ({"use_cache": False} if "use_cache" in known else {})


def run(model: Opened, given: Tokens, more: Mapping[str, Any], grad: bool = False) -> Any:
    """One run that gives each layer's weights to the listeners and frees them before the next layer, unless `grad`
    keeps them in a graph."""
    listened = {n: part for n, part in model.parts.items() if context.listeners(model.part_keys[n])}
    sides = {n: _real(part, given) for n, part in listened.items()}

    def tell(part: Part, module: nn.Module, weights: Tensor) -> None:
        name = next(n for n, other in listened.items() if other is part)
        real = _seen(weights) if name == "joint" else sides[name]
        if fault := real.fault(weights):
            raise ModelError(f"{type(model.hf).__name__} gives weights of which {fault}; it can not be read")
        map = as_map(weights, real, part.causal, window(module))
        nothing = weights.new_zeros(*weights.shape[:3], 0)
        context.hand_over(model.part_keys[name], part.modules[module], map, nothing)

    with torch.enable_grad() if grad else torch.no_grad(), giving(listened, tell):
        return model.hf(**(arguments(model, given) | dict(more) | asking(model.hf)))


def _real(part: Part, given: Tokens) -> Real:
    """Which tokens of a text are real; all positions of pictures, sounds and states are."""
    sides = (axis(part, name, given) if name in TEXTS else None for name in (part.queries, part.keys))
    return Real(*(None if side is None else side.mask.bool() for side in sides))


def _seen(weights: Tensor) -> Real:
    """Of words and patches in one row: a token that no query sees is padding."""
    seen = weights.detach().amax((1, 2)) > 0
    return Real(seen, seen)


def as_map(weights: Tensor, real: Real, causal: bool, window: int | None = None) -> AttentionMap:
    """Dense weights [batch, head, query, key] as an `AttentionMap`; rows of padding are zero."""
    batch, heads, queries, keys = weights.shape
    mask = Mask(
        queries, keys, left=None if window is None else window - 1, right=0 if causal else None,
        valid_keys=_some(real.keys), valid_queries=_some(real.queries),
    )  # fmt: skip
    flat = weights.new_zeros(batch, heads, max(queries, keys), 1, dtype=torch.float32)
    # the slope of the logarithm of nothing is infinite
    logs = torch.where(
        weights > 0, weights.float().clamp_min(torch.finfo(torch.float32).tiny).log(), -torch.inf
    )
    rule = ScoreRule(1.0, mask, bias=logs if torch.is_grad_enabled() else logs.detach())
    return AttentionMap.of(flat[:, :, :queries], flat[:, :, :keys], rule, flat[:, :, :queries, 0].clone())


def window(module: nn.Module) -> int | None:
    """The window of GPT-Neo's local attention, read from its mask buffer; None for attention to all earlier keys."""
    triangle = dict(module.named_buffers(recurse=False)).get("bias")
    if triangle is None or triangle.dtype != torch.bool or triangle.dim() != 4:
        return None
    most = int(triangle[0, 0, -1].sum())
    return most if most < triangle.shape[-1] else None


def _some(real: Tensor | None) -> Tensor | None:
    return None if real is None or real.all() else real.cpu()


@contextlib.contextmanager
def giving(parts: Mapping[str, Part], tell: Callable[[Part, nn.Module, Tensor], object]) -> Iterator[None]:
    """Forward hooks that pass the weights of the parts' modules to `tell` and replace them by an empty tensor."""
    owners = {module: part for part in parts.values() for module in part.modules}

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        place, order = owners[module].dense[module]
        if not isinstance(output, list | tuple) or len(output) <= place:
            return None  # one of several calls, which is not asked for its weights (LXMERT)
        weights = output[place]
        tell(owners[module], module, weights.permute(order))
        # of as many axes, which some models turn
        return type(output)([*output[:place], weights.new_empty((0,) * weights.dim()), *output[place + 1 :]])

    with on(list(owners), after=take):
        yield
