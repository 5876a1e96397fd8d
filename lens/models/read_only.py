"""Models that compute attention by themselves (BLOOM, Falcon, GPT-J, GPT-Neo, MPT, DeBERTa): read, never edited.

They do not use transformers' attention interface. With `output_attentions` their eager code returns dense weights,
which are taken one layer at a time. A layer's weights become an `AttentionMap` with the score bias log(weights).
Memory: queries × keys numbers for one layer, and for every layer if the record keeps maps. Values and head outputs are
not available.
"""

from __future__ import annotations

import contextlib
import inspect
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
from headwater.lens.models.classes import logits_of
from headwater.lens.models.closeness import close_or_refuse
from headwater.lens.models.inputs import arguments
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Part, number, width
from headwater.lens.naming.tokens import Tokens

READ_ONLY = "its own code computes its attention, so it is read-only (dense weights from output_attentions)"


def read_part(hf: Any, sample: Mapping[str, Tensor]) -> Part:
    """The `Part` of such a model; ModelError if it returns no weights, or weights that are not a softmax."""
    refusal = ModelError(
        f"{type(hf).__name__} computes its attention by itself and not through transformers' attention interface, and "
        "does not give its weights; Headwater can not read it"
    )
    found: list[tuple[nn.Module, Tensor]] = []
    if "input_ids" not in sample or getattr(hf.config, "is_encoder_decoder", False):
        raise refusal
    with torch.no_grad():
        plain = hf(**sample)
        with _giving(hf, None, lambda module, weights: found.append((module, weights))):
            told = hf(**sample, **_asking(hf))
    if not found:
        raise refusal
    mask = sample["attention_mask"].bool()
    for _, weights in found:
        _check(weights, mask, hf)
    what = f"{type(hf).__name__} computes otherwise when it gives its weights"
    plain, told = (_of_real(out, mask) for out in (plain, told))
    close_or_refuse(plain, told, what, "; it can not be read", least=0.1, error=ModelError)
    layers = number(found, {module: path for path, module in hf.named_modules()})
    _, weights = found[0]
    d_model = width(hf, found[0][0])
    return Part(
        "text", layers, "text", "text", not bool(weights[0].triu(1).any()), weights.shape[1], weights.shape[1],
        d_model // weights.shape[1], d_model,
    )  # fmt: skip


def run(model: Opened, given: Tokens, more: Mapping[str, Any]) -> Any:
    """One run that gives each layer's weights to the listeners and frees them before the next layer."""
    part = model.parts[model.part_name]

    def tell(module: nn.Module, weights: Tensor) -> None:
        _check(weights, given.mask, model.hf)
        map = as_map(weights, given.mask, part.causal, window(module))
        nothing = weights.new_zeros(weights.shape[0], weights.shape[1], weights.shape[2], 0)
        context.hand_over(model.key, part.modules[module], map, nothing)

    with torch.no_grad(), _giving(model.hf, part.modules, tell):
        return model.hf(**(arguments(model, given) | dict(more) | _asking(model.hf)))


def as_map(weights: Tensor, real: Tensor, causal: bool, window: int | None = None) -> AttentionMap:
    """Dense weights [batch, head, query, key] as an `AttentionMap`; rows of padding are zero."""
    batch, heads, queries, keys = weights.shape
    some = None if real.all() else real.cpu()
    mask = Mask(
        queries, keys, left=None if window is None else window - 1, right=0 if causal else None,
        valid_keys=some, valid_queries=some,
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


@contextlib.contextmanager
def _giving(
    hf: Any, modules: Mapping[nn.Module, int] | None, tell: Callable[[nn.Module, Tensor], object]
) -> Iterator[None]:
    """Forward hooks that pass square [batch, head, n, n] outputs to `tell` and replace them by an empty tensor.

    `modules=None` hooks every module; of nested modules the innermost one passes its weights.
    """

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, tuple):
            return None
        for place, item in enumerate(output):
            if isinstance(item, Tensor) and item.dim() == 4 and item.shape[-1] == item.shape[-2] > 0:
                tell(module, item)
                return (*output[:place], item.new_empty(0), *output[place + 1 :])
        return None

    with on(hf.modules() if modules is None else modules, after=take):
        yield


def _asking(hf: Any) -> dict[str, bool]:
    known = inspect.signature(hf.forward).parameters
    asking = {"output_attentions": True} if "output_attentions" in known or "kwargs" in known else {}
    return asking | ({"use_cache": False} if "use_cache" in known else {})


def _check(weights: Tensor, mask: Tensor, hf: Any) -> None:
    """ModelError unless each row of a real token sums to 1, is not negative, and is 0 on padding."""
    real = mask.to(weights.device)
    rows = weights.sum(-1).transpose(1, 2)[real]
    hidden = (weights * ~real[:, None, None, :]).transpose(1, 2)[real]
    off = float((rows - 1).abs().max())
    if (
        weights.shape[-1] != mask.shape[1]
        or off > 1e-3
        or float(hidden.max()) > 1e-6
        or bool((rows < 0).any())
    ):
        raise ModelError(
            f"{type(hf).__name__} gives weights that are no softmax over the real tokens; it can not be read"
        )


def _of_real(out: Any, mask: Tensor) -> Tensor:
    """Logits or hidden states, of real tokens where there are some for each token."""
    found = logits_of(out)
    found = out.last_hidden_state if found is None else found
    return found[mask.to(found.device)] if found.shape[:2] == mask.shape else found
