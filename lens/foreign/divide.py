"""Attention calls as parts of a model: which calls form one stack, what it is called, and the tokens of its axes.

Calls form one part if the paths of their modules differ only in numbers, they are the same call within their module,
and their maps have one size. A part is "self" or "cross"; where there are several of a kind, "self:encoder".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from headwater.lens.foreign.call import Call
from headwater.lens.foreign.meeting import AttentionCall, Key, Met
from headwater.lens.models.parts import CROSS, Part, Shape, number
from headwater.lens.models.stack import pattern

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
Group = dict[Key, Met]


def divide(met: Mapping[Key, Met], batch: int) -> tuple[dict[str, Part], dict[Key, AttentionCall]]:
    """The parts, the main part first, and the site of every call."""
    groups: dict[tuple, Group] = {}
    for key, each in met.items():
        call = each.call
        size = (len(call.q), call.q.shape[1], *call.lengths, is_own(key, each))
        groups.setdefault((pattern(key.path), key.nth, *size), {})[key] = each
    kinds = {names: "self" if names[-1] else "cross" for names in groups}
    named = dict(zip(groups, _named([(kinds[names], names[0], names) for names in groups]), strict=True))
    sites: dict[Key, AttentionCall] = {}
    parts: dict[str, Part] = {}
    for names, group in groups.items():
        made = {key: AttentionCall(key, names[-1]) for key in group}
        sites |= made
        axes = _axes(named[names], names, {named[other]: other for other in groups})
        parts[named[names]] = part_of(named[names], axes, group, made)
    return dict(sorted(parts.items(), key=lambda each: rank(each[1], met, batch))), sites


def unread(module: nn.Module, met: Mapping[Key, Met]) -> tuple[str, ...]:
    """Modules that are called attention and in which no call was met, as "blocks.*.attn (TalkingHeads)"."""
    read = {key.path for key in met}
    found = {}
    for path, each in module.named_modules():
        within = any(
            other == path or other.startswith(f"{path}.") or path.startswith(f"{other}.") for other in read
        )
        if path and ATTENTION.search(type(each).__name__) and not within:
            found[f"{pattern(path)} ({type(each).__name__})"] = None
    return tuple(found)


def is_own(key: Key, met: Met) -> bool:
    """Whether queries and keys of a call are the same tokens: as its module says, else by number and name."""
    queries, keys = met.call.lengths
    if met.alike is not None:
        return met.alike
    return queries == keys and not CROSS.search(key.path)


def _named(kinds: Sequence[tuple[str, str, tuple]]) -> list[str]:
    """A name for each group: its kind; with the path's first piece that tells groups of the kind apart; with sizes."""
    found = []
    for kind, path, names in kinds:
        alike = [other for other in kinds if other[0] == kind]
        name = kind
        if len(alike) > 1:
            own, others = path.split("."), [other[1].split(".") for other in alike]
            telling = [
                piece
                for n, piece in enumerate(own)
                if piece != "*" and {tuple(o[n : n + 1]) for o in others} != {(piece,)}
            ]
            name = ":".join([kind, *telling[:1]])
            rest = [other for other in alike if other[1] == path]
            if len(rest) > 1:
                name += (
                    f":{names[4]}"
                    if len({other[2][4] for other in rest}) == len(rest)
                    else f":{rest.index((kind, path, names))}"
                )
        while name in found:
            name += "'"
        found.append(name)
    return found


def _axes(name: str, names: tuple, others: Mapping[str, tuple]) -> tuple[str, str]:
    """The names of the query axis and the key axis."""
    kind, _, where = name.partition(":")
    if kind == "self":
        axis = f"position {where}".strip()
        return axis, axis if names[4] == names[5] else f"{axis} key"
    return f"query {where}".strip(), f"source {where}".strip()


def part_of(name: str, axes: tuple[str, str], group: Group, made: Mapping[Key, AttentionCall]) -> Part:
    """The part of a group of calls; `made` are their sites, `axes` the names of the query and the key axis."""
    calls = [(site, None) for site in made.values()]
    layers = number(calls, {site: key.path for key, site in made.items()})
    shapes = {layers[made[key]]: _shape(each.call) for key, each in group.items()}
    first = next(iter(group.values()))
    mask = first.call.mask(True)
    heads, width = first.call.q.shape[1], first.call.v.shape[3]
    modules: dict[nn.Module, int] = dict(layers)
    return Part(
        name, modules, *axes, mask.right == 0 and axes[0] == axes[1], shapes, first.width or heads * width,
    )  # fmt: skip


def _shape(call: Call) -> Shape:
    return Shape(call.q.shape[1], call.k.shape[1], call.q.shape[3], call.v.shape[3])


def rank(part: Part, met: Mapping[Key, Met], batch: int) -> tuple:
    """Main parts first: those with a row per example, then self-attention, then most layers, then the last to run."""
    order = {key: n for n, key in enumerate(met)}
    first = next(site for site in part.modules)
    assert isinstance(first, AttentionCall)
    return (
        len(met[first.key].call.q) != batch, part.name.partition(":")[0] != "self", -len(part.modules),
        -order[first.key],
    )  # fmt: skip
