"""`as_it_was`: a model that is run inside the block is afterwards what it was before.

Some models change themselves when they run: BigBird exchanges its sparse attention on a short text, dynamic rotary
tables and masks are kept for the next run, transformers puts its own hooks on, random numbers are drawn. Compared are
the configurations, every attribute of every module, which modules, parameters, buffers and hooks there are, the numbers
in the buffers, and the states of the generators of random numbers. What differs is put back. Parameters and very large
buffers are not copied: a model that writes into those is refused.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from headwater.lens.errors import ModelError

MOST_COPIED = 2**22  # numbers; a larger buffer is only watched
HOOKS = re.compile(
    r"_\w*_hooks\w*"
)  # dicts of modules; hooks of Headwater in them may belong to other threads
WANTED = re.compile(r"training|_?attn_implementation\w*")  # what opening a model is meant to change


@contextlib.contextmanager
def as_it_was(hf: Any) -> Iterator[State]:
    """Put the model back at the end; of a model that opens, eval mode and the attention function stay as they are.

    ModelError for a model that writes into its weights while it runs.
    """
    devices = sorted({t.device.index or 0 for t in hf.parameters() if t.device.type == "cuda"})
    state = State(hf)
    numbers, more_numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield state
    except BaseException:
        state.put_back(everything=True)
        raise
    finally:
        random.setstate(numbers)
        np.random.set_state(more_numbers)
    state.put_back()
    if written := state.written():
        raise ModelError(f"{type(hf).__name__} writes into {written} while it runs; it can not be read")


class State:
    """What a model was when this was made."""

    def __init__(self, hf: Any) -> None:
        self._packages = {"transformers", type(hf).__module__.partition(".")[0]}
        self._seen: set[int] = set()
        self._held: list[
            tuple[str, Any, Any]
        ] = []  # where it stands, the dict, list or set, and a copy of it
        self._hooks: list[tuple[dict[Any, Any], set[Any]]] = []
        self._tensors: list[tuple[str, Tensor, int | None, Tensor | None]] = []
        self._walk("", hf)

    def changes(self, everything: bool = False) -> list[str]:
        """Names of attributes that differ, with their plain values before and after."""
        return [text for *_, texts in self._differing(everything) for text in texts]

    def put_back(self, everything: bool = False) -> None:
        """Undo every change except, without `everything`, eval mode and the chosen attention function."""
        for now, then, _ in self._differing(everything):
            if isinstance(now, list):
                now[:] = then
            elif isinstance(now, set):
                now.clear()
                now.update(then)
            else:
                now |= {key: value for key, value in then.items() if not _kept(key, everything)}
                for key in [key for key in now if key not in then and not _kept(key, everything)]:
                    del now[key]
        # torch says in a second dict, under the same number, whether a hook takes keyword arguments
        own = {key for hooks, _ in self._hooks for key, hook in hooks.items() if _of_headwater(hook)}
        for hooks, then in self._hooks:
            for key in [key for key in hooks if key not in then and key not in own]:
                del hooks[key]
        with torch.no_grad():
            for _, tensor, version, copy in self._tensors:
                if copy is not None and version != _version(tensor):
                    tensor.copy_(copy)

    def written(self) -> str:
        """The parameter or large buffer that was written into and can not be put back; "" if there is none."""
        names = (n for n, t, version, copy in self._tensors if copy is None and version != _version(t))
        return next(names, "")

    def _walk(self, where: str, value: Any) -> None:
        if isinstance(value, str | int | float | type | None) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            small = not isinstance(value, nn.Parameter) and value.numel() <= MOST_COPIED
            self._tensors.append((where, value, _version(value), value.clone() if small else None))
        elif isinstance(value, dict | list | set):
            copy = value.copy()
            self._held.append((where, value, copy))
            for key, item in list(copy.items()) if isinstance(copy, dict) else list(enumerate(copy)):
                if isinstance(item, dict) and isinstance(key, str) and HOOKS.fullmatch(key):
                    self._hooks.append((item, set(item)))
                else:
                    inner = key in ("_modules", "_parameters", "_buffers")
                    self._walk(where if inner else f"{where}.{key}".lstrip("."), item)
        elif isinstance(value, tuple):
            for place, item in enumerate(value):
                self._walk(f"{where}.{place}", item)
        elif hasattr(value, "__dict__") and (
            isinstance(value, nn.Module | PreTrainedConfig | GenerationConfig)
            or type(value).__module__.partition(".")[0] in self._packages
        ):
            self._walk(where, vars(value))

    def _differing(self, everything: bool) -> Iterator[tuple[Any, Any, list[str]]]:
        for where, now, then in self._held:
            before, after = _items(then, everything), _items(now, everything)
            if before.keys() != after.keys() or any(before[key] is not after[key] for key in before):
                keys = [key for key in before | after if before.get(key) is not after.get(key)]
                named = (f"{where}.{key}".lstrip(".") for key in keys)
                yield now, then, [
                    f"{name} from {before.get(key)!r:.40} to {after.get(key)!r:.40}"
                    if isinstance(before.get(key), str | int | float | None) else name
                    for name, key in zip(named, keys, strict=True)
                ]  # fmt: skip


def _kept(key: Any, everything: bool) -> bool:
    """Whether a change of this attribute stays."""
    if not isinstance(key, str):
        return False
    return not everything and bool(WANTED.fullmatch(key))


def _items(held: Any, everything: bool) -> dict[Any, Any]:
    if isinstance(held, dict):
        return {key: value for key, value in held.items() if not _kept(key, everything)}
    return {item: item for item in held} if isinstance(held, set) else dict(enumerate(held))


def _of_headwater(hook: Any) -> bool:
    return type(hook).__module__.startswith("headwater.")


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written into; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version
