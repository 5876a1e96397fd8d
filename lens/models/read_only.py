"""Models that compute attention by themselves (BLOOM, GPT-J, DeBERTa, OpenAI GPT, BLIP …): read, never edited.

They do not use transformers' attention interface. With `output_attentions` their eager code returns dense weights
(dense_weights.py), which are taken one layer at a time. A layer's weights become an `AttentionMap` with the score bias
log(weights). Memory: queries × keys numbers for one layer, and for every layer if the record keeps maps. Values and
head outputs are not available.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
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
from headwater.lens.models.closeness import answer, close_or_refuse, of_real
from headwater.lens.models.dense_weights import Real, asking, given_parts
from headwater.lens.models.inputs import arguments
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Part, main_first
from headwater.lens.naming.tokens import Tokens

READ_ONLY = "its own code computes its attention, so it is read-only (dense weights from output_attentions)"
BY_ITSELF = "computes its attention by itself and not through transformers' attention interface, and"


def read_parts(
    hf: Any, sample: Mapping[str, Tensor], rows: Mapping[str, Tensor]
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts of such a model, the main part first, and the weights that it gives but that can not be read.

    `sample` is its input, `rows` the same as attention sees it, [row, position].
    ModelError with the reason if none can be read: the model gives no weights, or they have another shape than [batch,
    head, query, key], or are not a softmax over real tokens.
    """
    kind, options = type(hf).__name__, asking(hf)
    if "output_attentions" not in options:
        raise ModelError(f"{kind} {BY_ITSELF} has no output_attentions to ask it; Headwater can not read it")
    torch.manual_seed(0)  # some models draw numbers, and runs are compared
    with torch.no_grad():
        plain = hf(**sample, **{name: options[name] for name in options if name == "use_cache"})
    parts, refused, told = given_parts(hf, sample, rows)
    if parts and "input_ids" in sample and parts.keys() <= {"vision", "audio"}:
        refused.setdefault("text", "no weights are given")
    if not parts and refused:
        field, why = next(iter(refused.items()))
        raise ModelError(
            f"{kind} {BY_ITSELF} of the weights it gives ({field}) {why}; Headwater can not read it"
        )
    if not parts:
        raise ModelError(
            f"{kind} {BY_ITSELF} gives no weights with output_attentions=True; Headwater can not read it"
        )
    torch.manual_seed(0)
    with torch.no_grad(), _giving(parts, lambda part, module, weights: None):
        freed = answer(hf(**sample, **options))
    for out in (told, freed):
        close_or_refuse(
            of_real(answer(plain), sample), of_real(out, sample),
            f"{kind} computes otherwise when it gives its weights", "; it can not be read", least=0.1, error=ModelError,
        )  # fmt: skip
    return main_first(parts), tuple(sorted(refused))


def run(model: Opened, given: Tokens, more: Mapping[str, Any]) -> Any:
    """One run that gives each layer's weights to the listeners and frees them before the next layer."""
    listened = {n: part for n, part in model.parts.items() if context.listeners(model.part_keys[n])}
    sides = {n: _real(part, given) for n, part in listened.items()}

    def tell(part: Part, module: nn.Module, weights: Tensor) -> None:
        name = next(n for n, other in listened.items() if other is part)
        if fault := sides[name].fault(weights):
            raise ModelError(f"{type(model.hf).__name__} gives weights of which {fault}; it can not be read")
        map = as_map(weights, sides[name], part.causal, window(module))
        nothing = weights.new_zeros(*weights.shape[:3], 0)
        context.hand_over(model.part_keys[name], part.modules[module], map, nothing)

    with torch.no_grad(), _giving(listened, tell):
        return model.hf(**(arguments(model, given) | dict(more) | asking(model.hf)))


def _real(part: Part, given: Tokens) -> Real:
    """Which tokens of a text are real; all positions of pictures, sounds and states are."""
    sides = (axis(part, name, given) if name in TEXTS else None for name in (part.queries, part.keys))
    return Real(*(None if side is None else side.mask.bool() for side in sides))


def as_map(weights: Tensor, real: Real, causal: bool, window: int | None = None) -> AttentionMap:
    """Dense weights [batch, head, query, key] as an `AttentionMap`; rows of padding are zero."""
    batch, heads, queries, keys = weights.shape
    mask = Mask(
        queries, keys, left=None if window is None else window - 1, right=0 if causal else None,
        valid_keys=_some(real.keys), valid_queries=_some(real.queries),
    )  # fmt: skip
    flat = weights.new_zeros(batch, heads, max(queries, keys), 1, dtype=torch.float32)
    rule = ScoreRule(1.0, mask, bias=weights.detach().float().log())
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
def _giving(parts: Mapping[str, Part], tell: Callable[[Part, nn.Module, Tensor], object]) -> Iterator[None]:
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
