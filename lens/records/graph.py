"""`without_graph`: what a record holds, detached from the graph of the run that made it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


def without_graph(item: Any) -> Any:
    """`item` with its tensors detached, through dataclasses, dicts and tuples; `item` itself where none has a graph.

    What lies in a file has no graph and is not read.
    """
    if isinstance(item, Tensor):
        return item.detach() if item.requires_grad else item
    if type(item) is tuple:
        parts = tuple(map(without_graph, item))
        return parts if _differ(item, parts) else item
    if type(item) is dict:
        found = {name: without_graph(each) for name, each in item.items()}
        return found if _differ(tuple(item.values()), tuple(found.values())) else item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        before = {each.name: getattr(item, each.name) for each in dataclasses.fields(item) if each.init}
        after = {name: without_graph(each) for name, each in before.items()}
        changed = {name: each for name, each in after.items() if each is not before[name]}
        return dataclasses.replace(item, **changed) if changed else item
    return item


def _differ(before: tuple, after: tuple) -> bool:
    return any(a is not b for a, b in zip(before, after, strict=True))
