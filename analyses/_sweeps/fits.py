"""Whether a sweep fits its model: the layers, heads and edits that it names are looked for before a unit runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.analyses._sweeps.sweep import Sweep
from headwater.lens.errors import HeadwaterError, SweepError
from headwater.lens.experiments import edits_on_parts
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head


def refuse_misfit(sweep: Sweep, model: HookedModel, base: Path) -> None:
    """SweepError with the entry of the sweep that names what the model lacks. `base` is the sweep's folder."""
    for layers in sweep.layers:
        if wrong := [layer for layer in layers if layer not in model.layers]:
            raise SweepError(
                f"layers {layers}: {model.name} has no layer {wrong[0]}; its layers are {model.layers}"
            )
    for name, edits in sweep.edits.items():
        for place, edit in enumerate(edits):
            _hold_edit(f"edits.{name}.{place}", edit, model, base)
    for place, asked in enumerate(sweep.analyses):
        given = [(f"settings.{name}", name, value) for name, value in asked.settings.items()]
        for name, values in asked.each.items():
            given += [(f"each.{name}.{n}", name, value) for n, value in enumerate(values)]
        for where, name, value in given:
            setting = asked.entry.setting(name)
            if setting.names_heads:
                _hold_heads(f"analyses.{place}.{where}", value, model)
            if setting.names_layers:
                _hold_layers(f"analyses.{place}.{where}", value, model)


def _hold_edit(where: str, edit: Mapping[str, Any], model: HookedModel, base: Path) -> None:
    try:
        inside = edits_on_parts.contained(edit, base, SweepError, "sweep")
        with edits_on_parts.editing(model, [edits_on_parts.read(inside)]):
            pass
    except HeadwaterError as error:
        raise SweepError(f"{where}: {' '.join(str(error).split())}") from None


def _hold_heads(where: str, value: Any, model: HookedModel) -> None:
    """An analysis may read another part than the sweep's, so a head is wrong where no part has it."""
    views = [model.part(name) for name in model.parts]
    for name in _head_names(value):
        try:
            head = Head.parse(name)
        except HeadwaterError as error:
            raise SweepError(f"{where}: {error}") from None
        if not any(head.layer in view.layers and head.head < view.shape(head.layer).heads for view in views):
            heads = max(view.shape(layer).heads for view in views for layer in view.layers)
            raise SweepError(
                f"{where}: {model.name} has no head {head}; its layers are {model.layers}, with heads 0 to {heads - 1}"
            )


def _head_names(value: Any) -> Iterator[str | Head]:
    """The heads that a setting names one by one; words such as "all" and indices are left to the analysis."""
    if isinstance(value, str):
        yield from (word for word in re.split(r"[\s,;]+", value) if word[:1].isdigit())
    elif isinstance(value, Head):
        yield value
    elif isinstance(value, Iterable):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _head_names(each)


def _hold_layers(where: str, value: Any, model: HookedModel) -> None:
    blocks = {block for name in model.parts for block in model.part(name).blocks}
    numbers = [value] if isinstance(value, int) else [] if value is None or isinstance(value, str) else value
    for number in numbers:
        if number not in blocks and not -len(blocks) <= number < 0:  # -1 is the last one
            raise SweepError(f"{where}: {model.name} has no layer {number}; its layers are {model.layers}")
