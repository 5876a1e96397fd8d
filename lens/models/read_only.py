"""Models that compute attention by themselves (BLOOM, GPT-J, DeBERTa, OpenAI GPT, BLIP …): read, never edited.

They do not use transformers' attention interface. With `output_attentions` their eager code returns dense weights,
which are taken one layer at a time. A layer's weights become an `AttentionMap` with the score bias log(weights).
Memory: queries × keys numbers for one layer, and for every layer if the record keeps maps. Values and head outputs are
not available.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from headwater.lens.models.axes import axis
from headwater.lens.models.closeness import answer, close_or_refuse, of_real
from headwater.lens.models.inputs import arguments
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import (
    AUDIO,
    VISION,
    Part,
    Shape,
    batch_of,
    main_first,
    number,
    patches_of,
    width,
)
from headwater.lens.models.signature import FLOATS
from headwater.lens.naming.tokens import Tokens

READ_ONLY = "its own code computes its attention, so it is read-only (dense weights from output_attentions)"
BY_ITSELF = "computes its attention by itself and not through transformers' attention interface, and"
AXES = {"vision": ("image", "image"), "audio": ("audio", "audio"), "cross": ("decoder", "encoder")}


def read_parts(
    hf: Any, sample: Mapping[str, Tensor], rows: Mapping[str, Tensor]
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts of such a model, the main part first, and the weights that it gives but that can not be read.

    `sample` is its input, `rows` the same as attention sees it, [row, position].
    ModelError with the reason if none can be read: the model gives no weights, or they have another shape than [batch,
    head, query, key], or are not a softmax over real tokens.
    """
    asking, kind = _asking(hf), type(hf).__name__
    if "output_attentions" not in asking:
        raise ModelError(f"{kind} {BY_ITSELF} has no output_attentions to ask it; Headwater can not read it")
    seen: dict[
        int, tuple[nn.Module, Tensor]
    ] = {}  # by the tensor's id; of nested modules the innermost gives it first
    with torch.no_grad():
        plain = hf(**sample, **{name: asking[name] for name in asking if name == "use_cache"})
        with on(list(hf.modules()), after=lambda module, _, __, out: _note(seen, module, out)):
            told = hf(**sample, **asking)
    parts: dict[str, Part] = {}
    refused: dict[str, str] = {}
    for field, given in _attentions(told):
        modules = [seen.get(id(weights), (None,))[0] for weights in given]
        for name in _names(hf, field, rows):
            try:
                parts |= {} if name in parts else {name: _part(hf, name, given, modules, rows)}
                refused.pop(field, None)
                break
            except ModelError as error:
                refused.setdefault(field, str(error))
        else:
            refused.setdefault(field, "the owner is no part that Headwater knows")
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
    with torch.no_grad(), _giving(parts, lambda part, module, weights: None):
        freed = hf(**sample, **asking)
    for out in (told, freed):
        close_or_refuse(
            of_real(answer(plain), sample), of_real(answer(out), sample),
            f"{kind} computes otherwise when it gives its weights", "; it can not be read", least=0.1, error=ModelError,
        )  # fmt: skip
    return main_first(parts), tuple(sorted(refused))


def run(model: Opened, given: Tokens, more: Mapping[str, Any]) -> Any:
    """One run that gives each layer's weights to the listeners and frees them before the next layer."""
    listened = {n: part for n, part in model.parts.items() if context.listeners(model.part_keys[n])}
    sides = {n: _Real.of(part, given) for n, part in listened.items()}

    def tell(part: Part, module: nn.Module, weights: Tensor) -> None:
        name = next(n for n, other in listened.items() if other is part)
        if fault := sides[name].fault(weights):
            raise ModelError(f"{type(model.hf).__name__} gives weights of which {fault}; it can not be read")
        map = as_map(weights, sides[name], part.causal, window(module))
        nothing = weights.new_zeros(*weights.shape[:3], 0)
        context.hand_over(model.part_keys[name], part.modules[module], map, nothing)

    with torch.no_grad(), _giving(listened, tell):
        return model.hf(**(arguments(model, given) | dict(more) | _asking(model.hf)))


@dataclass(frozen=True)
class _Real:
    """Which queries and which keys are real, bool [batch, position]; None: all, however many there are."""

    queries: Tensor | None
    keys: Tensor | None

    @classmethod
    def of(cls, part: Part, given: Tokens) -> _Real:
        sides = (axis(part, part.queries, given), axis(part, part.keys, given))
        return cls(*(None if side is None else side.mask.bool() for side in sides))

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


def as_map(weights: Tensor, real: _Real, causal: bool, window: int | None = None) -> AttentionMap:
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


def _asking(hf: Any) -> dict[str, bool]:
    known = inspect.signature(hf.forward).parameters
    asking = {"output_attentions": True} if "output_attentions" in known or "kwargs" in known else {}
    return asking | ({"use_cache": False} if "use_cache" in known else {})


def _note(seen: dict[int, tuple[nn.Module, Tensor]], module: nn.Module, output: Any) -> None:
    place = _place(output)
    if place is not None:
        seen.setdefault(id(output[place]), (module, output[place]))


def _place(output: Any) -> int | None:
    """Where the weights stand among the outputs of an attention module: the first tensor of four axes."""
    items = enumerate(output) if isinstance(output, list | tuple) else ()
    return next((n for n, x in items if isinstance(x, Tensor) and x.dim() == 4 and x.numel()), None)


def _attentions(out: Any, owner: str = "") -> Iterator[tuple[str, Sequence[Tensor]]]:
    """(field, one tensor per layer) for everything in an output that is called attentions, those of its towers too."""
    for field, value in out.items() if isinstance(out, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _attentions(value, f"{owner}{field}.")
        elif field.endswith("attentions") and isinstance(value, list | tuple) and len(value):
            yield f"{owner}{field}", value


def _names(hf: Any, field: str, sample: Mapping[str, Tensor]) -> list[str]:
    """The parts that a field of the output may belong to, the likeliest first; none for what is no part."""
    owner, _, last = field.rpartition(".")
    if getattr(hf.config, "is_encoder_decoder", False):
        known = {f"{name}_attentions": name for name in ("encoder", "decoder", "cross")}
        return [known[last]] if not owner and last in known else []
    where = owner or last.removesuffix("attentions")
    if VISION.search(where):
        return ["vision"]
    if AUDIO.search(where):
        return ["audio"]
    text = where in ("language_", "text_") or "text" in owner
    if last != "attentions" and not text:
        return []
    others = {"audio" if FLOATS[name] == "audio" else "vision" for name in sample if name in FLOATS}
    return [*(["text"] if "input_ids" in sample else []), *(() if text else others)]


def _part(
    hf: Any, name: str, given: Sequence[Tensor], modules: Sequence[nn.Module | None], sample: Mapping[str, Tensor]
) -> Part:  # fmt: skip
    """The part whose layers gave these weights; ModelError says what hinders it, as a clause."""
    masks = {
        "text": sample.get("attention_mask"), "encoder": sample.get("attention_mask"),
        "decoder": sample.get("decoder_attention_mask"),
    }  # fmt: skip
    queries, keys = AXES.get(name, (name, name))
    real = _Real(*(None if mask is None else mask.bool() for mask in (masks.get(queries), masks.get(keys))))
    batch = batch_of(sample)
    for weights in given:
        if not isinstance(weights, Tensor):
            raise ModelError(
                "a layer has none, or more than one; load it with attn_implementation='eager' if you have not"
            )
        if fault := real.fault(weights):
            raise ModelError(fault)
        if len(weights) != batch or weights.shape[1:] != given[0].shape[1:]:
            raise ModelError(
                f"the shapes are {list(given[0].shape)} and {list(weights.shape)}, where one shape of {batch} rows is "
                "expected in all layers"
            )
    shape = given[0].shape
    if queries == keys and shape[2] != shape[3]:
        raise ModelError(f"the shape is {list(shape)}: its keys are not the tokens that its queries are")
    if any(module is None for module in modules) or len(set(modules)) < len(modules):
        raise ModelError("no module can be found for each layer")
    called = [(module, None) for module in modules if module is not None]
    d_model, first = width(hf, called[0][0]), given[0][0]
    causal = name != "cross" and shape[2] > 1 and not bool(first.triu(1).any())
    layers = number(called, {module: path for path, module in hf.named_modules()})
    heads, features = shape[1], d_model // shape[1]
    return Part(
        name, layers, queries, keys, causal, {n: Shape(heads, heads, features, features) for n in layers.values()},
        d_model, patches_of(hf, shape[3], sample) if keys == "image" else None,
        counts={keys: shape[3]} if keys in ("image", "audio") else {},
    )  # fmt: skip


@contextlib.contextmanager
def _giving(parts: Mapping[str, Part], tell: Callable[[Part, nn.Module, Tensor], object]) -> Iterator[None]:
    """Forward hooks that pass the weights of the parts' modules to `tell` and replace them by an empty tensor."""
    owners = {module: part for part in parts.values() for module in part.modules}

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        place = _place(output)
        if place is None:
            return None
        weights = output[place]
        tell(owners[module], module, weights)
        return type(output)([*output[:place], weights.new_empty(0), *output[place + 1 :]])

    with on(list(owners), after=take):
        yield
