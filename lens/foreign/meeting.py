"""`Meeting`: a torch function mode that meets the attention calls of one run and answers them with Headwater's.

A mode acts in the thread that entered it and changes nothing of torch. Which module calls is known from hooks that note
the modules whose `forward` runs. While a mode is on, torch leaves its fused encoder layers out and runs their steps.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headwater.kernels.attend import attend
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.attention.function import attention
from headwater.lens.attention.masks import LazyMask
from headwater.lens.attention.module_hooks import Given, off, on
from headwater.lens.errors import ModelError
from headwater.lens.foreign.call import Call, read

_met: ContextVar[nn.Module | None] = ContextVar("headwater_met", default=None)
FLEX = "flex_attention"
MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
# torch's own function without its first question, which would hand it to the mode again
UNASKED: Any = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda given: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


class Key(NamedTuple):
    """A call within a run: the path of the module, how often it ran before in this run, and which call of that run."""

    path: str
    visit: int
    nth: int


class AttentionCall(nn.Module):
    """A place where a module calls attention. It has no weights, and stands for the call as a layer of the model."""

    def __init__(self, key: Key, own: bool) -> None:
        super().__init__()
        self.key = key
        self.own = own  # whether queries and keys are the same tokens


class Met(NamedTuple):
    """What was seen of a call: the call, whether its queries and keys came as one tensor (None: not known), and the
    width of what its module read."""

    call: Call
    alike: bool | None
    width: int | None


class Meeting(TorchFunctionMode):
    """Answers the attention calls of `module`, and edits them, as each has one of the `sites`.

    `batch` is the number of examples of the run. Without `sites` no call is a layer of a model, and `met` notes them.
    """

    def __init__(self, module: nn.Module, batch: int, sites: Mapping[Key, AttentionCall] | None) -> None:
        super().__init__()
        self.module = module
        self.batch = batch
        self.sites = sites
        self.met: dict[Key, Met] = {}
        self._running: list[tuple[str, int, int | None]] = []
        self._visits: Counter[str] = Counter()
        self._calls: Counter[tuple[str, int]] = Counter()
        self._alike: bool | None = None
        self._map: AttentionMap | None = None

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Inside, the calls of this thread are met."""
        paths = {module: path for path, module in self.module.named_modules()}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
            path = paths[module]
            changed = None if path else self.begins(args, kwargs)
            args, kwargs = changed or (args, kwargs)
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            width = given.shape[-1] if given is not None and given.dim() == 3 else None
            self._running.append((path, self._visits[path], width))
            self._visits[path] += 1
            return changed

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            while self._running.pop()[0] != paths[module]:  # a forward that ended in an error is left too
                pass
            if not paths[module]:
                self.ends()

        token = _met.set(self.module)
        try:
            with on(list(paths), before=enter, after=leave), self:
                yield
        finally:
            with contextlib.suppress(ValueError):  # ended in another context
                _met.reset(token)

    def begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        """Called before each run of the module; calls are counted anew. Gives other arguments, or None."""
        self._running.clear()
        self._visits.clear()
        self._calls.clear()
        return None

    def ends(self) -> None:
        """Called after each run of the module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._running:  # other modules run beside this one
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._one(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        if getattr(func, "__name__", "") == FLEX:
            raise ModelError(
                f"{self._where()} calls flex_attention, which is no call of scaled_dot_product_attention; it can not "
                "be read"
            )
        return func(*args, **kwargs)

    def _where(self) -> str:
        return self._running[-1][0] or type(self.module).__name__

    def _one(self, *args: Any, **kwargs: Any) -> Tensor:
        path, visit, width = self._running[-1]
        key = Key(path, visit, self._calls[path, visit])
        self._calls[path, visit] += 1
        call = read(*args, **kwargs, where=self._where(), batch=self.batch)
        if self.sites is None:
            self.met[key] = Met(call, self._alike, width)
        elif key not in self.sites:
            raise ModelError(
                f"{self._where()} calls attention more often, or in another order, than on the sample; load the module "
                "with a sample that takes the same way"
            )
        z, self._map = answered(AttentionCall(key, False) if self.sites is None else self.sites[key], call)
        return z

    def _multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`multi_head_attention_forward`, whose path without weights calls `scaled_dot_product_attention`."""
        given = MULTI_HEAD.bind(*args, **kwargs)
        given.apply_defaults()
        named = given.arguments
        wanted, named["need_weights"] = named["need_weights"], False
        self._alike, self._map = _same(named["query"], named["key"]), None
        with self:
            out, _ = UNASKED(**named)
        self._alike = None
        if not wanted or self._map is None:
            return out, None
        weights = _every_row(self._map).to(out.dtype)
        weights = weights.mean(1) if named["average_attn_weights"] else weights
        return out, weights if named["query"].dim() == 3 else weights[0]


def is_met(module: nn.Module) -> bool:
    """Whether the calls of a module are met in this context already, whoever runs it."""
    return _met.get() is module


@contextmanager
def apart() -> Iterator[None]:
    """Inside, runs of a module are met for themselves, and not by the blocks around."""
    token = _met.set(None)
    try:
        with off():
            yield
    finally:
        _met.reset(token)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of one memory with one shape."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _every_row(map: AttentionMap) -> Tensor:
    """All weights [row, head, query, key], those of padding too, which a map has as zeros and torch gives."""
    weights, real = map.dense(), map.mask.valid_queries
    if real is None:
        return weights
    rule = replace(map.rule, mask=replace(map.mask, valid_queries=None))
    _, other = attend(map.q, map.k, map.k, rule, [step.edit for step in map.steps])
    return torch.where(real[:, None, :, None].to(weights.device), weights, other.dense())


def answered(site: AttentionCall, call: Call) -> tuple[Tensor, AttentionMap]:
    """The output of a call in the shape that torch gives it, and the map of its weights."""
    mask = call.mask(site.own)
    with context.discovering() as found:
        lazy = LazyMask(mask, len(call.q), call.q.device)
        given = (site, call.q, call.k, call.v, lazy, call.scale)
        z, _ = attention(*given, position_bias=call.bias)  # type: ignore[call-arg]
    map = found[0][1]
    context.discover(site, map)
    return z.transpose(1, 2).reshape(call.shape), map
