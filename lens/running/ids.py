"""What is known of a prompt while a model runs: its token ids, and the sinks found on it; positions are named by them.

Ids are read where the model embeds them, so that they are known in generation, and when the transformers model is
called directly. They live in a context variable and never on the model. Beam search reorders rows behind the back of
the ids; greedy search and sampling do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import module_hooks
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import embeddings
from headwater.lens.naming.tokens import Tokens

UNKNOWN = -1  # an id that no call has shown, as where a cache was filled before the edits were on


@dataclass(frozen=True, eq=False)
class Running:
    """`ids` [batch, position] so far, the first `prompt` read in one call; `fresh` are embedded and not placed yet.

    `mask` is that of the first layer in the call that runs now. `sinks` are bool [batch, layer, head, position] by
    name, found on `sink_ids`. `memory` is for edits that need something of earlier calls of the same run.
    """

    ids: Tensor | None = None
    prompt: int = 0
    fresh: Tensor | None = None
    sinks: Mapping[str, Tensor] = field(default_factory=dict)
    sink_ids: Tensor | None = None
    mask: Mask | None = None
    memory: dict[Any, Any] = field(default_factory=dict)


_running: ContextVar[Mapping[object, Running]] = ContextVar("headwater_running", default=MappingProxyType({}))


def _keep(key: object, run: Running) -> Running:
    _running.set({**_running.get(), key: run})
    return run


@contextlib.contextmanager
def reading(model: Opened) -> Iterator[None]:
    """Read the ids of every call of the model in this context."""
    key = model.key

    def see(module: Any, given: tuple, named: dict[str, Any]) -> None:
        ids = given[0] if given else next(iter(named.values()), None)
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            _keep(key, replace(current(key), fresh=ids.detach().cpu()))

    outside = _running.get().get(key)
    _keep(key, outside or Running())
    try:
        with module_hooks.on(embeddings(model.hf), before=see):
            yield
    finally:
        others = {k: run for k, run in _running.get().items() if k is not key}
        _running.set(others if outside is None else {**others, key: outside})


def current(key: object) -> Running:
    """What is known of the call that runs now."""
    return _running.get().get(key, Running())


def enter(key: object, mask: Mask) -> Running:
    """The first layer's attention runs with this mask: place the ids; a call from position 0 begins a new run."""
    run = _running.get().get(key, Running())
    if run.mask is mask:
        return run
    run = replace(run, mask=mask)
    if run.fresh is None:  # nothing was embedded for this call
        return _keep(key, replace(run, ids=None, memory=run.memory if mask.query_offset else {}))
    if run.fresh.shape[1] != mask.queries:
        return _keep(key, replace(run, ids=None, fresh=None))  # positions that are no tokens of the text
    begin = mask.query_offset
    if begin == 0:
        return _keep(key, replace(run, ids=run.fresh, prompt=mask.queries, fresh=None, memory={}))
    earlier = torch.full((len(run.fresh), begin), UNKNOWN)
    if run.ids is not None and len(run.ids) == len(run.fresh):
        known = run.ids[:, :begin]
        earlier[:, : known.shape[1]] = known
    ids = torch.cat([earlier, run.fresh], 1)
    return _keep(key, replace(run, ids=ids, prompt=run.prompt or begin, fresh=None))


def know_sinks(key: object, found: Mapping[str, Tensor], given: Tokens | None) -> None:
    """Keep the sinks found on a prompt that is about to run; `given` are the tokens they stand on, None for no text."""
    _keep(key, replace(current(key), sinks=found, sink_ids=None if given is None else given.ids.cpu()))
