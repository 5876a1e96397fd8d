"""The row of a family whose inputs have forms of their own, measured against eager attention module by module.

The inputs are the first that opening a model tries and that this one takes. The weights of every attention module are
those that a hook finds in its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headwater.lens.attention.module_hooks import on
from headwater.lens.edits import Knockout, ScaleHeads
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.models.parts import Part
from headwater.lens.naming.heads import Head
from headwater.lens.samples.samples import samples

Inputs = Mapping[str, Any]  # tensors, under transformers' names


def first_taken(reference: Any) -> dict[str, Tensor]:
    """The first sample that runs."""
    for inputs in samples(reference):
        try:
            _outputs(reference, inputs)
        except Exception:  # of any kind: the form is another model's
            continue
        # padding gets other ids on the way, which shows in rows that mean nothing
        return {n: torch.ones_like(t) if n.endswith("attention_mask") else t for n, t in inputs.items()}
    return {}


def difference(reference: Any, hooked: HookedModel, inputs: Inputs) -> float:
    """The largest difference of any output."""
    return _apart(_outputs(reference, inputs), _outputs(hooked.hf, inputs))


def size(reference: Any, inputs: Inputs) -> float:
    return max(float(found.nan_to_num(0, 0, 0).abs().max()) for found in _outputs(reference, inputs))


def map_difference(reference: Any, hooked: HookedModel, inputs: Inputs) -> float:
    """The largest difference of a recorded map from what its module gives; infinite where none gives any."""
    worst = float("inf")
    paths = {module: path for path, module in hooked.hf.named_modules()}
    for name, part in hooked.parts.items():
        torch.manual_seed(0)
        record = hooked.part(name).record(**inputs)
        given = _given(reference, part, paths, inputs)
        for layer in record.layers:
            found, dense = record.pattern(layer), given.get(layer)
            if dense is None:  # the module keeps its weights to itself
                continue
            if dense.shape[1] == found.shape[1] and len(dense) > len(found):
                worst = max(_in_any_order(found, dense), 0.0 if worst == float("inf") else worst)
                continue
            if sorted(dense.shape) != sorted(found.shape):
                return float("inf")
            if dense.shape != found.shape:  # XLNet's [query, key, batch, head]
                dense = dense.permute(2, 3, 0, 1)
            apart = float(((found - dense).abs() * record.valid[:, None, :, None]).max())
            worst = apart if worst == float("inf") else max(worst, apart)
    return worst


def _in_any_order(found: Tensor, dense: Tensor) -> float:
    """How far the largest weights of a map are from those of windows that are folded into the batch, head by head."""
    count = dense[:, 0].numel()
    one, other = (each.transpose(0, 1).flatten(1).sort(descending=True).values for each in (found, dense))
    return float((one[:, :count] - other).abs().max())


def moved_by_edits(hooked: HookedModel, inputs: Inputs) -> tuple[float | str, float | str]:
    """What edits change of any output, the smallest over parts: the first key hidden, no head in the last layer."""
    plain = _outputs(hooked.hf, inputs)
    moved: list[list[float]] = [[], []]
    for name in hooked.parts:
        part = hooked.part(name)
        last = part.layers[-1]
        heads: dict[str | Head, float] = {f"{last}.{head}": 0.0 for head in range(part.shape(last).heads)}
        for place, edit in enumerate((Knockout("all", [0]), ScaleHeads(heads))):
            try:
                with part.edit(edit):
                    moved[place].append(_apart(plain, _outputs(hooked.hf, inputs)))
            except EditError:
                return "refused", "refused"
    return min(moved[0]), min(moved[1])


def _given(reference: Any, part: Part, paths: Mapping[Any, str], inputs: Inputs) -> dict[int, Tensor]:
    """The weights by layer: the last tensor of four axes that each module gives."""
    chunks: dict[int, list[Tensor]] = {}
    layers = {reference.get_submodule(paths[module]): layer for module, layer in part.modules.items()}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        dense = (
            [t for t in output if isinstance(t, Tensor) and t.dim() == 4]
            if isinstance(output, list | tuple)
            else []
        )
        chunks.setdefault(layers[module], []).extend(dense[-1:])

    torch.manual_seed(0)
    with torch.no_grad(), on(list(layers), after=keep):
        reference(**inputs, output_attentions=True)
    return {layer: found[0] for layer, found in chunks.items() if found}


def _outputs(hf: Any, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(0)  # some draw numbers
    with torch.no_grad():
        return list(_floats({name: value for name, value in hf(**inputs).items() if "past_key" not in name}))


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() and value.numel() else []
    elif isinstance(value, Mapping):
        yield from _floats(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _floats(each)


def _apart(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=False) if a.shape == b.shape]
    return max(float((a - b).nan_to_num(0, 0, 0).abs().max()) for a, b in pairs)
