"""`held`: the models that stay in memory between clicks, for all sessions, within a share of what memory there is.

A model that was used longest ago goes when a new one needs its room, unless a run or a job is at it. What the sessions
change travels with their calls, never on a model, so they can share it.

Models and libraries are half a million objects that never become garbage: `gc.freeze` takes them out of the sight of
each collection. What sessions leave behind stays in sight, and goes when Python collects, which it does by how much has
come since; Streamlit would collect after each run of a script, and look at every session that is open.
"""

from __future__ import annotations

import atexit
import gc
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import headwater as hw
from headwater.lens.records.free_memory import free_memory

SHARE = 0.5  # of the memory that is free or taken by held models
BETWEEN = 60.0  # seconds between two thorough collections
_models: OrderedDict[str, hw.HookedModel] = OrderedDict()
_uses: Counter[str] = Counter()
_thorough = time.monotonic()
_imported = 0  # modules, when they were hidden last
_lock = threading.Lock()
atexit.register(gc.unfreeze)  # libraries take themselves apart at the end, what is hidden too
# so that two sessions do not load the same model
_loading = threading.Lock()


def held(name: str, load: Callable[[], hw.HookedModel]) -> hw.HookedModel:
    """The model of this name, which `load` gives where it is not held yet."""
    with _lock:
        if name in _models:
            _models.move_to_end(name)
            return _models[name]
    with _loading:
        with _lock:
            if name in _models:  # another session loaded it meanwhile
                return _models[name]
        model = load()
        with _lock:
            _models[name] = model
            dropped = _make_room(name)
        settle(dropped)
    return model


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, the model of this name is not dropped."""
    with _lock:
        _uses[name] += 1
    try:
        yield
    finally:
        with _lock:
            _uses[name] -= 1


def names() -> list[str]:
    """The models that are held, the one used last at the end."""
    with _lock:
        return list(_models)


def size(model: hw.HookedModel) -> int:
    """Bytes of the weights and buffers; shared ones count once."""
    tensors = chain(model.hf.parameters(), model.hf.buffers())
    found = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(found.values())


def settle(thoroughly: bool = False) -> None:
    """Collect garbage once, `thoroughly` also among what was hidden before, and hide all that is left from the next."""
    global _thorough
    if thoroughly:
        gc.unfreeze()
        _thorough = time.monotonic()
    gc.collect()
    gc.freeze()


def tidy() -> None:
    """Hide what the run of a page imported.

    Sessions that are open now are hidden with it; they go at the next thorough look after they ended.
    """
    global _imported
    if len(sys.modules) > _imported:
        settle(thoroughly=time.monotonic() - _thorough > BETWEEN)
        _imported = len(sys.modules)


def _make_room(newest: str) -> bool:
    """Drop the models that were used longest ago until the rest fit; whether any was dropped."""
    sizes = {name: size(model) for name, model in _models.items()}
    most = SHARE * (free_memory() + sum(sizes.values()))
    dropped = False
    for name in list(_models):
        if sum(sizes.values()) <= most:
            break
        if name != newest and not _uses[name]:
            del _models[name], sizes[name]
            dropped = True
    return dropped
