"""`recorders` and `finish`: which parts of a model one run records, with which settings, and the record in the end.

A model with one part gives one record. A model with several gives the record of its main part with the others in
`record.parts`, because every part has its own tokens, heads and layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from headwater.kernels.maps import statistics as kernel
from headwater.lens.errors import PromptError, RecordError, nearest
from headwater.lens.models.axes import TEXTS, axis
from headwater.lens.models.beginning import first_token
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Part
from headwater.lens.models.token_groups import token_groups
from headwater.lens.naming.heads import Layers, chosen_layers
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records.contents import UNORDERED, Axis
from headwater.lens.records.fit import refuse_misfit
from headwater.lens.records.labels import labels
from headwater.lens.records.record import DEFAULT_STATISTICS, Record, undefined
from headwater.lens.records.recorder import Recorder, key_positions

Groups = Mapping[str, Any] | Sequence[str] | str | None


def recorders(
    model: Opened, found: Tokens, statistics: Iterable[str], layers: Layers, keep: Iterable[str], groups: Groups,
    grad: bool = False,
) -> dict[str, Recorder]:  # fmt: skip
    """{part: recorder} for the parts that run on this prompt; if `model` is not its main part, only for that part."""
    _refuse_unlisted(statistics, keep, groups)
    asked = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    first = model.part_name
    everything = first == next(iter(model.parts))
    made: dict[str, Recorder] = {}
    for name in model.parts if everything else (first,):
        view, part = (model if name == first else model.part(name)), model.parts[name]
        queries, keys = axis(part, part.queries, found), axis(part, part.keys, found)
        if queries is None or keys is None:
            if name == first:
                raise PromptError(
                    f"the prompt has nothing for the part {name!r} of {model.name}; give its input too"
                )
            continue
        named = _named(view, found, keys, groups, strict=name == first)
        chosen = layers
        if name != first and layers != "all":
            chosen = [n for n in chosen_layers(layers, model.layers) if n in view.layers]
        wanted = _fitting(view, asked, named, strict=name == first)
        if name == first or isinstance(chosen, str | int) or chosen:
            made[name] = Recorder(view, queries, keys, wanted, chosen, keep, named)
            made[name].grad = grad
    return made


def _fitting(
    view: Opened, asked: tuple[str, ...], groups: Mapping[str, Tensor] | None, strict: bool
) -> tuple[str, ...]:
    """The statistics that a part has: none that its axes give no meaning (record.py), no "mass" without groups.

    With `strict` asking for such a statistic by name is a RecordError.
    """
    part = view.parts[view.part_name]
    ordered = not part.crosses and part.queries not in UNORDERED
    reasons = [why for name in asked if (why := undefined(name, part.crosses, ordered))]
    if reasons and strict and asked != DEFAULT_STATISTICS:
        raise RecordError(f"{reasons[0]}; leave it out")
    asked = tuple(name for name in asked if not undefined(name, part.crosses, ordered))
    return asked if strict or groups else tuple(name for name in asked if name not in kernel.GROUPED)


def _refuse_unlisted(statistics: Any, keep: Any, groups: Any) -> None:
    """RecordError for a value that is no text and no list of texts."""
    for name, given, form in (
        ("statistics", statistics, "names such as ('entropy',), or ()"),
        ("keep", keep, "'qk', 'qkv' or ()"),
        ("groups", () if groups is None else groups, "{'name': positions}, or names of token groups"),
    ):
        if not isinstance(given, Iterable):
            raise RecordError(f"{name}={given!r} can not be read; give {form}")


def _named(
    view: Opened, found: Tokens, keys: Tokens, groups: Groups, strict: bool
) -> dict[str, Tensor] | None:
    """Groups of keys as bool [batch, key]; with `strict=False`, for the other parts, only the named token groups."""
    if groups is None:
        return None
    known = token_groups(view, found)
    asked = [groups] if isinstance(groups, str) else groups
    items = dict(asked) if isinstance(asked, Mapping) else {str(name): name for name in asked}
    picked = {}
    for name, value in items.items():
        if isinstance(value, str) and value in known:
            picked[str(name)] = known[value]
        elif strict and isinstance(value, str) and value == "generated":
            raise RecordError(
                "nothing says where the prompt ends; give groups={'generated': slice(length, None)}"
            )
        elif strict and isinstance(value, str) and value != "all":
            raise RecordError(f"{view.name} has no token group {value!r}: {nearest(value, known)}")
        elif strict:
            picked[str(name)] = key_positions(value, keys)
    return picked


def finish(model: Opened, found: Tokens, made: Mapping[str, Recorder]) -> Record:
    """The record of the part of `model`, with the records of the other parts that ran."""
    records = {}
    for name, recorder in made.items():
        if name != model.part_name and not recorder.was_called:
            continue
        part = model.parts[name]
        about = _about(model, part, found)
        record = recorder.finish(about["first_token"])
        told = labels(model, part, part.queries, found, recorder.tokens)
        keys = None
        if part.crosses:
            ids, mask = recorder.keys.ids, recorder.keys.mask
            keys = Axis(ids.cpu(), mask.cpu(), *labels(model, part, part.keys, found, recorder.keys))
        about = record.provenance | about
        records[name] = replace(record, strings=told.strings, grids=told.grids, keys=keys, provenance=about)
        try:
            refuse_misfit(records[name])
        except ValueError as error:
            raise RecordError(f"the record of {model.name} ({name}) contradicts itself: {error}") from None
    main = records.pop(model.part_name)
    return replace(main, parts=records) if records else main


def _about(model: Opened, part: Part, found: Tokens) -> dict[str, Any]:
    """What the provenance of a record says about its part: its name, the names of its axes, and its first token."""
    about: dict[str, Any] = {}
    if len(model.parts) > 1 or part.queries != "text":
        about = {"part": part.name, "axes": [part.queries, part.keys]}
    if _crosses_first(model, part):
        about["cross_first"] = True
    text = axis(part, part.queries, found) if part.queries in TEXTS else None
    about["first_token"] = "" if text is None else first_token(model, text)
    return about


def _crosses_first(model: Opened, part: Part) -> bool:
    """Whether the blocks of a stack look at another stack before they look at their own tokens."""
    other = [p for p in model.parts.values() if p.crosses and p.queries == part.queries and p is not part]
    if not other:
        return False
    paths = {module: path for path, module in model.hf.named_modules()}
    own, across = ({paths[module] for p in some for module in p.modules} for some in ([part], other))
    for block in part.stack:
        order = [step.path in own for step in block.steps if step.path in own | across]
        if len(set(order)) == 2:
            return not order[0]
    return False
