"""Read the effective maps of a model's layers during one run, each held to what the layer gave in that run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from headwater.lens.attention import module_hooks
from headwater.lens.errors import ModelError, named_line
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.mixers.kernel_calls import hold_output, known, observed
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
                form, ours = observed(module, args, kwargs)
            hold_output(ours, own)
        except ModelError as error:
            raise ModelError(f"{what} has no effective map: {error}") from None
        except Exception as error:  # code of the layer, run without the hooks that may belong to it
            raise ModelError(f"{what} can not be run a second time ({named_line(error):.200})") from error
        found[layer] = EffectiveMap(
            layer, path, type(module).__name__, form.kind, form.map, form.values, own, form.skip, form.offset,
            provenance,
        )  # fmt: skip

    with module_hooks.on(places, after=keep):
        yield found
    silent = [f"layer {layer} ({path})" for layer, path in places.values() if layer not in found]
    if silent:
        raise ModelError(f"{model.name}: {', '.join(silent)} did not run, so it has no effective map")


def _places(model: Opened) -> dict[nn.Module, tuple[int, str]]:
    """The modules to read, with their layer and path; ModelError for a mixer of an unknown kind."""
    places: dict[nn.Module, tuple[int, str]] = {}
    for mixer in model.mixers:
        what = f"layer {mixer.layer} of {model.name}: {mixer.name} ({mixer.path})"
        module = model.hf.get_submodule(mixer.path)
        if not known(module):
            raise ModelError(f"{what} has no effective map: Headwater does not know how it mixes positions")
        if mixer.layer in {layer for layer, _ in places.values()}:
            raise ModelError(f"{what} is the second mixer of its layer, and a layer has one effective map")
        places[module] = (mixer.layer, mixer.path)
    return places
