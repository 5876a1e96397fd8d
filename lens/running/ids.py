"""The token ids and sinks of the prompt that runs now, by which edits look up positions such as "token:Mary".

A hook on the embedding reads the ids, so that they are known in generation too, and when the transformers model is
called directly. They are in a context variable: every caller sees only its own prompt (`attention/context.py` says
why). Beam search reorders the rows of the cache without new ids, so the ids are wrong there; greedy search and sampling
do not.

One call of the model passes through three steps: the embedding hook stores the ids as `fresh`; the attention of the
first layer calls `enter` with its mask, which says at which positions they stand; `current` gives the result to edits.
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

UNKNOWN = -1  # the id of a position that no call showed: the cache was filled before the edits were on


@dataclass(frozen=True, eq=False)
class Running:
    """What is known of one run.

    `ids`: the ids so far, [batch, position]; the first `prompt` of them came in one call. `fresh`: ids that were
    embedded in this call, whose positions are not known before the first attention layer runs. `mask`: the mask of that
    layer. `sinks`: bool [batch, layer, head, position] by name, found on the prompt `sink_ids`. `memory`: values that
    edits keep from one call of a run to the next.
    """

    ids: Tensor | None = None
    prompt: int = 0
    fresh: Tensor | None = None
    sinks: Mapping[str, Tensor] = field(default_factory=dict)
    sink_ids: Tensor | None = None
    mask: Mask | None = None
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def has_its_sinks(self) -> bool:
        """Whether the run begins with the prompt on which the sinks were found."""
        prompt = self.sink_ids
        if prompt is None or self.ids is None:
            return prompt is None
        begun = self.ids[:, : prompt.shape[1]]
        return begun.shape == prompt.shape and bool(((begun == prompt) | (prompt == UNKNOWN)).all())


_running: ContextVar[Mapping[object, Running]] = ContextVar("headwater_running", default=MappingProxyType({}))


def _keep(key: object, run: Running) -> Running:
    _running.set({**_running.get(), key: run})
    return run


@contextlib.contextmanager
def reading(model: Opened) -> Iterator[None]:
    """Inside, read the ids of every call of the model in this context.

    Blocks nest: an inner block goes on with the run of the outer one, and its end restores what the outer one knew.
    """
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
    """What is known of the run, for the layer that runs now; empty outside of `reading`."""
    return _running.get().get(key, Running())


def enter(key: object, mask: Mask) -> Running:
    """Place the fresh ids where the mask of the first layer says; a call that starts at position 0 begins a new run.

    Several edits call this with the same mask; only the first call has an effect.
    """
    run = _running.get().get(key, Running())
    if run.mask is mask:
        return run
    run = replace(run, mask=mask)
    if run.fresh is None:  # this call had embeddings as input, not ids
        return _keep(key, replace(run, ids=None, memory=run.memory if mask.query_offset else {}))
    if run.fresh.shape[1] != mask.queries:
        return _keep(key, replace(run, ids=None, fresh=None))  # some positions are not tokens of the text
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
    """Keep the sinks of the prompt that runs next; `given` are its tokens, None if it is not text."""
    # what stands on padding is no part of a prompt: models get their own padding token there
    prompt = None if given is None else given.ids.masked_fill(~given.mask, UNKNOWN).cpu()
    _keep(key, replace(current(key), sinks=found, sink_ids=prompt))
