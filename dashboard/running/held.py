"""`held`: the models that stay in memory between clicks, for all sessions, within a share of what memory there is.

A model that was used longest ago goes when a new one needs its room, unless a run or a job is at it. What the sessions
change travels with their calls, never on a model, so they can share it.

Streamlit collects all garbage after each run of a script. Models and libraries are half a million objects that never
become garbage: `gc.freeze` takes them out of its sight.
"""

from __future__ import annotations

import atexit
import gc
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import headwater as hw
from headwater.lens.records.free_memory import free_memory

SHARE = 0.5  # of the memory that is free or taken by held models
GROWN = 20_000  # objects that a collection looks at in some milliseconds
BETWEEN = 600.0  # seconds between two thorough collections
_models: OrderedDict[str, hw.HookedModel] = OrderedDict()
_uses: Counter[str] = Counter()
_thorough = time.monotonic()
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
    """Keep the collection after each script run short: hide what came since, such as what a page imported.

    What is hidden and becomes garbage in a circle, such as a session that ended, goes at the next thorough look.
    """
    if len(gc.get_objects(2)) > GROWN:
        settle(thoroughly=time.monotonic() - _thorough > BETWEEN)


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
