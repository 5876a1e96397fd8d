"""Find what every block of a model does, from one short run.

The blocks are the entries of the module lists that hold the attention modules. Each module of a block is called once
more with the hidden state of one position changed. If the output changes at another position, the module mixes
positions. What mixes positions and holds no attention that is read is a mixer, whatever its class is called.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache

from headwater.lens.attention import context, module_hooks
from headwater.lens.attention.function import register_layers
from headwater.lens.loading.between_blocks import mixing_between
from headwater.lens.models.parts import Part
from headwater.lens.models.stack import Kind, StackBlock, Step, mixers_of, named, pattern
from headwater.lens.running.watching import Call

_Found = TypeVar("_Found")
DEEP = 4  # levels of modules below a block that are looked at
ROUNDING = (
    256  # a change of another position below so many roundings of the output, by root mean square, is none
)
COARSE = 0.02  # nor below this share of it, which many roundings of 16 bits do not reach


def with_stacks(
    hf: Any, parts: Mapping[str, Part], sample: Mapping[str, Tensor], read_only: bool = False
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts with their stacks, and texts that name everything that mixes positions and has no map.

    `read_only`: the attention does not go through the interface, so what it does beside its map shows where it has a
    softmax over all positions.
    """
    keys = {} if read_only else {name: register_layers(part.modules) for name, part in parts.items()}
    look = _Look(hf, parts, keys)
    arguments = {**sample, **({"use_cache": False} if _takes(hf, "use_cache") else {})}
    with torch.no_grad(), look.on(), context.discovering():
        hf(**arguments)
    found = {
        name: replace(part, stack=tuple(look.stack(entries, part)))
        for name, part in parts.items()
        if (entries := look.entries[name]) is not None
    }
    mixers = {mixer: None for part in found.values() for mixer in mixers_of(part.stack)}
    outside = look.outside()
    if not look.mixing:
        with torch.no_grad():
            outside += look.between(arguments)
    return found, (*named(list(mixers)), *outside)


def _takes(hf: Any, name: str) -> bool:
    known = inspect.signature(hf.forward).parameters
    passed_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()) and hf.can_generate()
    return name in known or passed_on


@dataclass
class _Look:
    hf: Any
    parts: Mapping[str, Part]
    keys: Mapping[str, object]  # of the parts whose attention goes through the interface
    read: set[nn.Module] = field(init=False)  # attention modules whose maps are read
    paths: dict[nn.Module, str] = field(init=False)
    entries: dict[str, list[nn.Module]] = field(init=False)  # the blocks of each part
    steps: dict[nn.Module, tuple[Step, ...]] = field(init=False, default_factory=dict)
    axes: dict[nn.Module, int] = field(init=False, default_factory=dict)  # of what each block hands on
    others: set[nn.Module] = field(
        init=False
    )  # modules outside of the blocks that hold no attention that is read
    called: set[nn.Module] = field(init=False, default_factory=set)
    mixing: list[nn.Module] = field(
        init=False, default_factory=list
    )  # those of the others that mix positions

    def __post_init__(self) -> None:
        self.read = {module for part in self.parts.values() for module in part.modules}
        self.paths = {module: path for path, module in self.hf.named_modules()}
        self.entries = {name: self._blocks(part) for name, part in self.parts.items()}
        blocks = {block for entries in self.entries.values() for block in entries}
        inside = {module for block in blocks for module in block.modules()}
        self.others = {m for m in self.hf.modules() if m not in inside and not blocks & set(m.modules())}

    def _blocks(self, part: Part) -> list[nn.Module]:
        """The entries of the lists that hold the attention modules of a part, at the deepest number that differs."""
        steps = [self.paths[module].split(".") for module in part.modules]
        places = [place for place, piece in enumerate(steps[0]) if piece.isdigit()]
        differing = [n for n in places if len({path[n] for path in steps}) > 1]
        if not places:
            return []
        lists = [
            n for n in places if isinstance(self.hf.get_submodule(".".join(steps[0][: n + 1])), nn.ModuleList)
        ]
        place = differing[-1] if differing else next((n for n in places if n not in lists), places[0])
        holders = dict.fromkeys(".".join(path[:place]) for path in steps)
        return [entry for path in holders for entry in self.hf.get_submodule(path).children()]

    # --- the run

    def on(self) -> Any:
        """Look at each block as soon as it has run, so that only the calls of one block are kept."""
        blocks = {block for entries in self.entries.values() for block in entries}
        calls: dict[nn.Module, Call] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not isinstance(output, Tensor) and not (
                isinstance(output, tuple | list) and output and isinstance(output[0], Tensor)
            ):
                return
            # a copy, because some blocks add to it in place
            calls[module] = Call(module, args, kwargs, module_hooks.first_output(output).detach().clone())
            if module in blocks:
                with module_hooks.off():
                    self.steps[module] = _uncollected(lambda: tuple(self._steps(module, calls)))
                self.axes[module] = calls[module].output.dim()
                calls.clear()
            elif module in self.others:
                self.called.add(module)
                with module_hooks.off():
                    if calls[module].output.shape == _given(calls[module]).shape and self._mixes(
                        calls[module]
                    ):
                        self.mixing.append(module)
                calls.clear()

        watched = {m for block in blocks for m in self._within(block, DEEP)} | self.others
        return module_hooks.on(watched, after=keep)

    def _within(self, module: nn.Module, levels: int) -> Iterator[nn.Module]:
        yield module
        if levels and module not in self.read:
            for child in module.children():
                yield from self._within(child, levels - 1)

    # --- one block

    def _steps(self, block: nn.Module, calls: Mapping[nn.Module, Call]) -> list[Step]:
        found: list[tuple[Kind, nn.Module]] = list(self._inside(block, calls, calls[block]))
        reads = bool(self.read & set(block.modules()))
        if not any(kind == "mixer" for kind, _ in found):
            if not reads and self._mixes(calls[block]):
                found = [("mixer", block)]
            elif reads and self._mixes_beside(
                calls[block]
            ):  # in its own `forward`, or in a layout of its own
                found.append(("mixer", block))
        order = {module: place for place, module in enumerate(calls)}
        found.sort(key=lambda step: order.get(step[1], len(order)))
        return [Step(kind, self.paths[module], type(module).__name__) for kind, module in found]

    def _inside(
        self, module: nn.Module, calls: Mapping[nn.Module, Call], block: Call
    ) -> Iterator[tuple[Kind, nn.Module]]:
        for child in module.children():
            if child in self.read:
                yield "attention", child
                if child in calls and self._mixes_beside(calls[child]):
                    yield "mixer", child
            elif child not in calls or self.read & set(child.modules()):
                yield from self._inside(child, calls, block)
            elif _of_stream(calls[child], block) and self._mixes(calls[child]):
                yield "mixer", self._innermost(child, calls, self._mixes)
            elif _is_mlp(calls[child], block):
                yield "mlp", self._innermost(child, calls, lambda call: _is_mlp(call, block))

    def _innermost(
        self, module: nn.Module, calls: Mapping[nn.Module, Call], alike: Callable[[Call], bool]
    ) -> nn.Module:
        """The module inside of `module`, of the same kind, whose output `module` adds to what it was given; else
        `module`."""
        whole = calls[module]
        if _given(whole).shape != whole.output.shape:
            return module
        added = whole.output - _given(whole)
        rounding = torch.finfo(added.dtype).eps * float(whole.output.abs().max())
        close = 1e-3 * float(added.abs().max()) + 2 * rounding
        for child in module.children():
            call = calls.get(child)
            if call is None or call.output.shape != added.shape:
                continue
            if torch.allclose(call.output, added, rtol=1e-3, atol=close) and alike(call):
                return self._innermost(child, calls, alike)
        return module

    def _mixes_beside(self, call: Call) -> bool:
        """Whether an attention module, or a block around it, moves information between positions beside the maps.

        Values at another position may change with the hidden state of one, or its output although the heads give what
        they gave before.
        """
        given = _given(call)
        if given.dim() != 3 or len(given[0]) < 3 or call.output.shape[:2] != given.shape[:2]:
            return False
        place = len(given[0]) // 3
        changed = given.clone()
        changed[0, place] = given[0, place].flip(-1) + given[0, -1]
        try:
            return (self._moved_beside if self.keys else _moved_without_maps)(call, given, changed, place)
        except Exception:  # it can not be called again, so nothing shows that it keeps positions apart
            return True

    def _moved_beside(self, call: Call, given: Tensor, changed: Tensor, place: int) -> bool:
        first = {key: _Heads() for key in self.keys.values()}
        second = {key: _Heads(heads.z) for key, heads in first.items()}
        with _tapped(first):
            before = _called(call, given.clone())
        with _tapped(second):
            after = _called(call, changed)
        return _moved(before, after, place) or any(
            _moved(value.transpose(1, 2), second[key].values[layer].transpose(1, 2), place)
            for key, heads in first.items()
            for layer, value in heads.values.items()
            if value.shape[2] == len(given[0])  # keys are the queries' own positions
        )

    def _mixes(self, call: Call) -> bool:
        """Whether a change of one position's hidden state changes the output at another position."""
        given = _given(call)
        if given.dim() < 2 or not given.is_floating_point() or call.output.dim() != given.dim():
            return False
        rows, after = (given, call.output) if given.dim() == 2 else (given[0], call.output[0])
        if len(rows) != len(after) or len(rows) < 3:
            return False
        place = len(rows) // 3 if given.dim() > 2 else 0
        changed = given.clone()
        (changed if given.dim() == 2 else changed[0])[place] = rows[place].flip(-1) + rows[-1]
        try:
            again = _called(call, changed)
            if not _moved(call.output, again, place):
                return False
            return _moved(_called(call, given.clone()), again, place)  # unless it changes what it is given
        except Exception:  # it can not be called again, so nothing shows that it keeps positions apart
            return True

    # --- what came of it

    def stack(self, entries: list[nn.Module], part: Part) -> Iterator[StackBlock]:
        for place, block in enumerate(entries):
            inside = set(block.modules())
            own = [layer for module, layer in part.modules.items() if module in inside]
            steps = self.steps.get(block)
            if steps is None:  # it did not run, so nothing is known of it
                steps = (Step("mixer", self.paths[block], type(block).__name__),)
            yield StackBlock(own[0] if own else place, self.paths[block], steps, self.axes.get(block, 0))

    def outside(self) -> list[str]:
        """What mixes positions outside of the blocks, and other blocks that did not run; the outermost ones alone."""
        silent: list[nn.Module] = []
        for holder in self.others:
            if isinstance(holder, nn.ModuleList) and not self.called & set(holder.modules()):
                silent += [entry for entry in holder if _names_attention(entry)]
        return [*self._kinds(self.mixing, ""), *self._kinds(silent, ", not called")]

    def between(self, arguments: Mapping[str, Any]) -> list[str]:
        """The class of the model if something between its blocks mixes positions; one part's blocks at a time."""
        last = next(reversed(self.steps), None)
        stacks = {
            tuple(entries): None for entries in self.entries.values() if self.steps.keys() & set(entries)
        }
        if any(mixing_between(self.hf, entries, arguments, last in entries, _moved) for entries in stacks):
            return [f"{type(self.hf).__name__} (outside of its blocks)"]
        return []

    def _kinds(self, modules: list[nn.Module], note: str) -> list[str]:
        outermost = [m for m in modules if not any(m is not n and m in set(n.modules()) for n in modules)]
        kinds = {(type(module).__name__, pattern(self.paths[module])): None for module in outermost}
        return [f"{name} ({where}{note})" for name, where in kinds]


class _OwnPositions(TorchDispatchMode):
    """Makes every softmax over square scores give each row its own position alone, and counts them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.met = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        softmax = function in (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
        if not softmax or found.dim() < 3 or found.shape[-2:] != (self.size, self.size):
            return found
        self.met += 1
        return torch.eye(self.size, dtype=found.dtype, device=found.device).expand_as(found).contiguous()


def _moved_without_maps(call: Call, given: Tensor, changed: Tensor, place: int) -> bool:
    """Of attention outside of the interface: whether positions meet although each attends to itself alone."""
    with _OwnPositions(len(given[0])) as own:
        before = _called(call, given.clone())
        after = _called(call, changed)
    return own.met > 0 and _moved(before, after, place)


class _Heads(context.Tap):
    """Keeps the values and the heads' outputs of attention calls by layer, or makes the heads give `held`."""

    def __init__(self, held: Mapping[int, Tensor] | None = None) -> None:
        self.held = held
        self.values: dict[int, Tensor] = {}
        self.z: dict[int, Tensor] = {}

    def entering(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.values[layer] = v
        return q, k, v

    def leaving(self, layer: int, z: Tensor) -> Tensor:
        self.z[layer] = z
        return z if self.held is None else self.held[layer]


@contextlib.contextmanager
def _tapped(taps: Mapping[object, context.Tap]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for key, tap in taps.items():
            stack.enter_context(context.tapping(key, tap))
        yield


def _uncollected(look: Callable[[], _Found]) -> _Found:
    """What `look` finds, in a context where transformers does not collect the hidden states that blocks give."""
    inside = copy_context()
    for variable in inside:
        if variable.name == "output_collector":
            inside.run(variable.set, None)
    return inside.run(look)


def _names_attention(module: nn.Module) -> bool:
    return any("attention" in type(inner).__name__.lower() for inner in module.modules())


def _moved(before: Tensor, after: Tensor, place: int) -> bool:
    """Whether outputs of the first row differ anywhere but at a position."""
    before, after = (t if t.dim() == 2 else t[0] for t in (before, after))
    moved = (after.float() - before.float()).flatten(1).square().mean(1).sqrt()
    moved[place] = 0
    least = min(ROUNDING * torch.finfo(after.dtype).eps, COARSE)
    return bool(moved.max() > least * before.float().square().mean().sqrt())


def _given(call: Call) -> Tensor:
    tensors = [*call.args, call.kwargs.get("hidden_states"), *call.kwargs.values()]
    return next((t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), torch.empty(0))


def _called(call: Call, given: Tensor) -> Tensor:
    """What the module gives for other hidden states, without the cache that the call has filled."""
    old = _given(call)

    def other(item: Any) -> Any:
        return given if item is old else None if isinstance(item, Cache) else item

    kwargs = {name: other(item) for name, item in call.kwargs.items()}
    return module_hooks.first_output(call.module(*map(other, call.args), **kwargs))


def _of_stream(call: Call, block: Call) -> bool:
    """Whether a module takes one vector for each position of the block."""
    given, stream = _given(call), _given(block)
    return given.dim() > 1 and given.shape[:-1] in (stream.shape[:-1], (stream[..., 0].numel(),))


def _is_mlp(call: Call, block: Call) -> bool:
    """Whether a module with weight matrices writes vectors as wide as the stream; not a mere change of basis."""
    width = _given(block).shape[-1]
    if call.output.shape[-1] != width or not any(w.dim() > 1 for w in call.module.parameters()):
        return False
    return not isinstance(call.module, nn.Linear) or _given(call).shape[-1] != width
