"""Find the parts of a model in the dense weights that it gives on `output_attentions=True`.

A field of the output holds one tensor for each layer. The module that gave a tensor is found by its memory, also where
the model turned its axes. Layers whose maps have other numbers of queries or keys are parts of their own: the stages of
a pyramid, or latents that read an input. Weights that are no softmax over real keys are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention.module_hooks import on
from headwater.lens.errors import ModelError
from headwater.lens.models.axes import TEXTS
from headwater.lens.models.closeness import answer, close_or_refuse, of_real
from headwater.lens.models.part_axes import Axes, axes_of, own_name
from headwater.lens.models.parts import (
    AUDIO,
    CROSS,
    VISION,
    Dense,
    Part,
    Shape,
    batch_of,
    main_first,
    number,
    patches_of,
    pictures,
    width,
)  # fmt: skip
from headwater.lens.models.read_only import Real, asking, giving
from headwater.lens.models.signature import FLOATS
from headwater.lens.models.stack import pattern

BY_ITSELF = "computes its attention by itself and not through transformers' attention interface, and"


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer as the output has them, and the module that gave them, and where."""

    weights: Tensor
    module: nn.Module | None
    dense: Dense | None
    width: int | None  # of the hidden states that the module was given


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
    parts, refused, told = _given_parts(hf, sample, rows)
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
    with torch.no_grad(), giving(parts, lambda part, module, weights: None):
        freed = answer(hf(**sample, **options))
    for out in (told, freed):
        close_or_refuse(
            of_real(answer(plain), sample), of_real(out, sample),
            f"{kind} computes otherwise when it gives its weights", "; it can not be read", least=0.1, error=ModelError,
        )  # fmt: skip
    return main_first(parts), tuple(sorted(refused))


def _given_parts(
    hf: Any, sample: Mapping[str, Tensor], rows: Mapping[str, Tensor]
) -> tuple[dict[str, Part], dict[str, str], Tensor]:
    """The parts by name, {field: why it is no part}, and what the model answered."""
    seen: dict[tuple[int, int], list[_Layer]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 2), None)
        for place, tensor in enumerate(output) if isinstance(output, list | tuple) else ():
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.numel():
                wide = None if states is None else states.shape[-1]
                seen.setdefault(_memory(tensor), []).append(_Layer(tensor, module, Dense(place, ()), wide))

    torch.manual_seed(0)  # some models draw numbers
    with torch.no_grad(), on(list(hf.modules()), after=note):
        told = hf(**sample, **asking(hf))
    parts: dict[str, Part] = {}
    refused: dict[str, str] = {}
    for field, given in _attentions(told):
        try:
            layers = [_owned(weights, seen) for weights in _flat(given)]
            parts |= _of_field(hf, field, layers, rows, set(parts))
        except ModelError as error:
            refused.setdefault(field, str(error))
    return parts, refused, answer(told)


def _flat(given: Any) -> Iterator[Any]:
    """The tensors of a field, also where each stage has a tuple of its own."""
    for each in given:
        if isinstance(each, list | tuple):
            yield from _flat(each)
        else:
            yield each


def _memory(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _owned(weights: Any, seen: Mapping[tuple[int, int], list[_Layer]]) -> _Layer:
    """A layer with the innermost module that gave these weights, and the order of axes that makes them of its own."""
    if not isinstance(weights, Tensor):
        raise ModelError(
            "a layer has none, or more than one; load it with attn_implementation='eager' if you have not"
        )
    for layer in seen.get(_memory(weights), ()):
        order = _order(layer.weights, weights)
        if order is not None and layer.dense is not None:
            return _Layer(weights, layer.module, layer.dense._replace(order=order), layer.width)
    return _Layer(weights, None, None, None)


def _order(own: Tensor, weights: Tensor) -> tuple[int, ...] | None:
    """How the axes of a module's tensor stand in the output's tensor on the same memory; None if not at all."""
    axes = list(zip(own.shape, own.stride(), strict=True))
    wanted = list(zip(weights.shape, weights.stride(), strict=True))
    if axes == wanted:
        return tuple(range(4))
    if sorted(axes) != sorted(wanted) or len(set(axes)) < len(axes):
        return None
    return tuple(axes.index(axis) for axis in wanted)


def _attentions(out: Any, owner: str = "") -> Iterator[tuple[str, Sequence[Any]]]:
    """(field, one tensor per layer) for everything in an output that is called attentions, those of its towers too."""
    for field, value in out.items() if isinstance(out, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _attentions(value, f"{owner}{field}.")
        elif field.endswith("attentions") and isinstance(value, list | tuple) and len(value):
            yield f"{owner}{field}", value


def _of_field(
    hf: Any, field: str, layers: Sequence[_Layer], sample: Mapping[str, Tensor], taken: set[str]
) -> dict[str, Part]:
    """The parts in one field of the output; ModelError says what hinders it, as a clause."""
    stages: dict[tuple[int, ...], list[_Layer]] = {}
    for layer in layers:
        if layer.weights.dim() != 4:
            raise ModelError(Real(None, None).fault(layer.weights))
        stages.setdefault((layer.weights.shape[0], *layer.weights.shape[2:]), []).append(layer)
    paths = {module: path for path, module in hf.named_modules()}
    kind = _kind(hf, field, sample)
    found: dict[str, Part] = {}
    for stage, members in enumerate(stages.values(), 1):
        name, axes = _named(hf, kind, members, sample, paths)
        if len(stages) > 1 and (kind in ("vision", "audio") or name in found):
            name = f"{name}{stage}"
        if name in taken:
            continue
        found[name] = _part(hf, name, axes, members, sample, paths)
    return found


def _kind(hf: Any, field: str, sample: Mapping[str, Tensor]) -> str:
    """What a field's name says of its part: "text", "encoder", "decoder", "vision", "audio", "cross" or "other"."""
    owner, _, last = field.rpartition(".")
    if CROSS.search(last):
        return "cross"
    if getattr(hf.config, "is_encoder_decoder", False):
        return last.removesuffix("_attentions") if not owner and last != "attentions" else "other"
    where = owner or last.removesuffix("attentions")
    if VISION.search(where):
        return "vision"
    if AUDIO.search(where):
        return "audio"
    if where in ("language_", "text_") or "text" in owner:
        return "text"
    if where:
        return "other"
    if "input_ids" in sample:
        return "text"
    axis = next((FLOATS[name] for name in sample if name in FLOATS), "")
    return {"image": "vision", "": "other"}.get(axis, axis)


def _named(
    hf: Any, kind: str, members: Sequence[_Layer], sample: Mapping[str, Tensor], paths: Mapping[nn.Module, str]
) -> tuple[str, Axes]:  # fmt: skip
    """The name and the axes of one stage, held to the numbers of tokens."""
    _, _, queries, keys = members[0].weights.shape
    encodes = bool(getattr(hf.config, "is_encoder_decoder", False))
    axes = axes_of("text" if kind == "other" else kind, (queries, keys), sample, None, encodes)
    module = members[0].module
    path = "" if module is None else pattern(paths[module])
    floats = {FLOATS[name] for name in sample if name in FLOATS}
    if kind == "text" and axes.queries == "query" and floats:
        if "image" in floats and VISION.search(path):
            return "vision", Axes("image", "image", {"image": queries})
        if queries > sample["input_ids"].shape[1]:  # words and patches in one row (ViLT)
            return "joint", Axes("state", "state", {"state": queries})
    if (axes.queries == "query" and kind not in ("cross", "decoder")) or kind == "other":
        return own_name(path) if path else kind, axes
    return kind, axes


def _part(
    hf: Any, name: str, axes: Axes, members: Sequence[_Layer], sample: Mapping[str, Tensor],
    paths: Mapping[nn.Module, str],
) -> Part:  # fmt: skip
    first = members[0].weights
    masks = {
        "text": sample.get("attention_mask"), "encoder": sample.get("attention_mask"),
        "decoder": sample.get("decoder_attention_mask"),
    }  # fmt: skip
    real = Real(
        *(None if mask is None else mask.bool() for mask in map(masks.get, (axes.queries, axes.keys)))
    )
    if axes.queries in TEXTS and axes.keys == "state" and not CROSS.search(name):
        length = first.shape[2]
        raise ModelError(
            f"the shape is {list(first.shape)}, where [{len(first)}, heads, {length}, {length}] is expected: its keys "
            "are not the tokens that its queries are"
        )
    rows = {batch_of(sample), pictures(sample)}
    for member in members:
        if len(member.weights) not in rows:
            raise ModelError(
                f"the shape is {list(member.weights.shape)}, where {batch_of(sample)} rows are expected: its windows "
                "are folded into the batch"
            )
        if fault := real.fault(member.weights):
            raise ModelError(fault)
    modules = [member.module for member in members if member.module is not None]
    if len(set(modules)) < len(members):
        raise ModelError("no module can be found for each layer")
    called = [(module, None) for module in modules]
    d_model = width(hf, modules[0], members[0].width)
    causal = axes.queries == axes.keys and first.shape[2] > 1 and not bool(first[0].triu(1).any())
    layers = number(called, paths)
    shapes = {
        layers[member.module]: Shape(*[member.weights.shape[1]] * 2, *[d_model // member.weights.shape[1]] * 2)
        for member in members if member.module is not None
    }  # fmt: skip
    alone = axes.queries == axes.keys == "image" and len(first) == pictures(sample)
    frames = next((t.shape[-1] for n, t in sample.items() if FLOATS.get(n) == "audio"), 1)
    return Part(
        name, layers, axes.queries, axes.keys, causal, shapes, d_model,
        patches_of(hf, first.shape[3], sample) if alone else None,
        frames / first.shape[3] if axes.keys == "audio" else 1.0, counts=axes.counts,
        beside=bool(FLOATS.keys() & sample.keys()),
        dense={m.module: m.dense for m in members if m.module is not None and m.dense is not None},
    )  # fmt: skip
