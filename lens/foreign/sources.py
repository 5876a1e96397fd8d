"""`told_apart`: calls whose queries and keys are as many, and come from different inputs.

Every input of the sample is changed in turn, and a call whose queries follow other inputs than its keys is
cross-attention. In later layers the queries follow the source too, so the answer holds for a whole stack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from headwater.lens.foreign.meeting import Key, Met
from headwater.lens.foreign.module import ForeignModule
from headwater.lens.models.stack import pattern


def told_apart(hf: ForeignModule, met: Mapping[Key, Met]) -> dict[Key, Met]:
    """The calls, with `alike` False for those of a stack in which queries and keys follow no common input. A module
    that fails on a changed input tells nothing by it."""
    tensors = hf.arguments.tensors
    changed = {name: other for name, given in tensors.items() if (other := _changed(given)) is not None}
    open_calls = {key for key, each in met.items() if each.alike is None and len(set(each.call.lengths)) == 1}
    if len(changed) < 2 or not open_calls:
        return dict(met)
    queries: dict[Key, set[str]] = {key: set() for key in open_calls}
    keys: dict[Key, set[str]] = {key: set() for key in open_calls}
    for name, other in changed.items():
        with contextlib.suppress(Exception):
            for key, each in hf.calls({**tensors, name: other}).items():
                if key in open_calls:
                    before = met[key].call
                    if not before.q.equal(each.call.q):
                        queries[key].add(name)
                    if not before.k.equal(each.call.k):
                        keys[key].add(name)
    apart = {
        (pattern(key.path), key.nth)
        for key in open_calls
        if queries[key] and keys[key] and not queries[key] & keys[key]
    }
    return {
        key: each._replace(alike=False)
        if key in open_calls and (pattern(key.path), key.nth) in apart
        else each
        for key, each in met.items()
    }


def _changed(given: Tensor) -> Tensor | None:
    """Other numbers that the module takes as well; None for masks and for single numbers."""
    if given.dim() < 2 or given.dtype == torch.bool:
        return None
    other = given.flip(-1)
    if other.equal(given):
        other = given.flip(tuple(range(given.dim())))
    return None if other.equal(given) else other
