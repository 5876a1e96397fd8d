"""Read the effective maps of a model's layers during one run, each held to what the layer gave in that run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from headwater.lens.attention import module_hooks
from headwater.lens.errors import ModelError
from headwater.lens.mixers import kernel_calls
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.models.opened import Opened


@contextlib.contextmanager
def reading(model: Opened, provenance: Mapping[str, Any]) -> Iterator[dict[int, EffectiveMap]]:
    """Inside, a run of the model fills the dict with the map of every mixer of this part, by layer.

    Each layer is run once more with its recurrence computed from the map. `map @ values` is held to the layer's own
    recurrence, head by head, and the output to the layer's own: within 1e-4 of the largest number in float32, 4
    roundings of a coarser dtype. ModelError names the layer, its class and module for a mixer of an unknown kind, for
    one that does not agree, and for two in one block.
    """
    places = _places(model)
    found: dict[int, EffectiveMap] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer, path = places[module]
        what = f"layer {layer} of {model.name}: {type(module).__name__} ({path})"
        if layer in found:
            raise ModelError(f"{what} ran twice, so it has no single map; run one text in one pass")
        own = module_hooks.first_output(output).detach()
        try:
            with torch.no_grad(), module_hooks.off():
                form, ours = kernel_calls.observed(module, args, kwargs)
        except ModelError as error:
            raise ModelError(f"{what} has no effective map: {error}") from None
        worst, close = kernel_calls.differing(ours, own, (0, 1, 2))
        if not bool(worst <= close):
            raise ModelError(
                f"{what} has no effective map: with the map its output differs by {float(worst):.1e} from its own "
                f"(rounding is {float(close):.1e})"
            )
        found[layer] = EffectiveMap(
            layer, path, type(module).__name__, form.kind, form.map, form.values, form.skip, form.offset, own,
            provenance,
        )  # fmt: skip

    with module_hooks.on(places, after=keep):
        yield found


def _places(model: Opened) -> dict[nn.Module, tuple[int, str]]:
    """The modules to read, with their layer and path; ModelError for a mixer of an unknown kind."""
    places: dict[nn.Module, tuple[int, str]] = {}
    for path, module in model.hf.named_modules():
        if kernel_calls.known(module):
            places[module] = (next(int(p) for p in path.split(".") if p.isdigit()), path)
    return places
