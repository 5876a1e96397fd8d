"""Norms, activations and products of one forward pass, so that its backward pass follows the rules that are on.

Which modules are norms and activations is measured, not read from names. Products, and activations that a model calls
as functions, are met at the call. All of it is on for one forward pass, in its context and thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headwater.lens.attention import backward_rules, module_hooks
from headwater.lens.attention.backward_rules import Rules, shown
from headwater.lens.errors import ModelError
from headwater.lens.models import norms
from headwater.lens.models.opened import Opened

PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
ACTIVATIONS = (
    F.gelu, F.silu, F.relu, F.relu6, F.mish, F.leaky_relu, F.elu, F.selu, F.celu, F.hardswish, F.hardtanh, F.tanh,
    torch.relu, torch.tanh, Tensor.relu, Tensor.tanh,
)  # fmt: skip
GATES = (F.softmax, F.sigmoid, torch.softmax, torch.sigmoid, Tensor.softmax, Tensor.sigmoid)
PROBE = (-3.0, -1.5, 0.0, 0.25, 1.5, 3.0)
AT_ZERO = PROBE.index(0.0)


@dataclass(frozen=True)
class _Norm:
    centred: bool
    epsilon: float


_Kind = _Norm | Literal["activation", "gate"] | None
_kinds: WeakKeyDictionary[nn.Module, _Kind] = WeakKeyDictionary()


@contextlib.contextmanager
def through(model: Opened) -> Iterator[None]:
    """Inside, a forward pass of the model builds the graph that the rules ask for; nothing where no rules are on."""
    rules = backward_rules.current()
    if rules is None:
        yield
        return
    if model.read_only:
        raise ModelError(
            f"{model.name} can be read but not changed ({model.read_only}), so its backward pass is the plain gradient"
        )
    if model.mixers:
        raise ModelError(
            f"{model.name} moves information between positions without attention ({model.mixers[0].name}), for which "
            "there is no backward rule; take the plain gradient"
        )
    leaves = [m for m in model.hf.modules() if not any(True for _ in m.children()) and _may_be(m)]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if not isinstance(output, Tensor) or given is None or not output.requires_grad:
            return None
        kind = _kind(module, given, output)
        if isinstance(kind, _Norm):
            return _with_constant_scale(module, kind, given, output)
        if kind is None or rules.ratio:
            return None if kind is None else _passed(kind, rules, given, output)
        with (
            module_hooks.off(),
            backward_rules.paused(),
        ):  # the slope of the whole: its own code may hold products
            return shown(output, (module(given), 1.0))

    with module_hooks.on(leaves, after=after, early=True), _Calls(rules):
        yield


def _may_be(module: nn.Module) -> bool:
    """Whether a module without children may be a norm or an activation."""
    return all(weight.dim() < 2 for weight in module.parameters(recurse=False))


def _kind(module: nn.Module, given: Tensor, output: Tensor) -> _Kind:
    if module not in _kinds:
        with module_hooks.off(), backward_rules.paused(), torch.no_grad():
            _kinds[module] = _pointwise(module) or _norm(module, given.detach(), output.detach())
    return _kinds[module]


def _norm(module: nn.Module, given: Tensor, output: Tensor) -> _Norm | None:
    if not norms.is_norm(module, given, output):
        return None
    return _Norm(norms.takes_mean_out(module, given.shape[-1]), norms.epsilon(module))


def _pointwise(module: nn.Module) -> Literal["activation", "gate"] | None:
    """Whether each number that a module gives is a function of the number in its place, and whether that is 0 at 0."""
    if any(True for _ in module.parameters()):
        return None
    probe = torch.tensor(PROBE)
    try:
        found, back, some = module(probe), module(probe.flip(0)), module(probe[:4])
    except Exception:  # it takes other inputs than one tensor
        return None
    if not isinstance(found, Tensor) or found.shape != probe.shape or torch.equal(found, probe):
        return None
    if not (torch.allclose(found, back.flip(0)) and torch.allclose(found[:4], some)):
        return None
    return "activation" if abs(float(found[AT_ZERO])) < 1e-6 else "gate"


def _with_constant_scale(module: nn.Module, norm: _Norm, given: Tensor, output: Tensor) -> Tensor:
    """`output` of a norm, whose gradient takes the division by the deviation for one by a constant."""
    high = torch.promote_types(given.dtype, torch.float32)
    width = given.shape[-1]
    with module_hooks.off(), backward_rules.paused(), torch.no_grad():
        gain = norms.norm_gain(module, width, high).to(given.device)
        x = given.to(high)
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        factor = gain / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt()
    with backward_rules.paused():
        x = given.to(high)
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        return shown(output, ((x * factor).to(output.dtype), 1.0))


def _passed(
    kind: Literal["activation", "gate"], rules: Rules, given: Tensor, output: Tensor
) -> Tensor | None:
    """`output` of a pointwise function, whose gradient is its ratio or nothing; None for the slope."""
    if not rules.ratio:
        return None
    if kind == "gate":
        return output.detach()
    with torch.no_grad():
        zero = given == 0  # f'(0) is 1 or near ½; a zero carries no relevance, so that any number will do
        ratio = torch.where(zero, 0.5, output / given.masked_fill(zero, 1.0)).to(output.dtype)
    return shown(output, (given * ratio, 1.0))


class _Calls(TorchFunctionMode):
    """Products, activations and gates that are called as functions. A mode belongs to a thread: the context variable
    says whether the caller is in the context that asked."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if (
            not isinstance(found, Tensor)
            or not found.requires_grad
            or backward_rules.current() is not self.rules
        ):
            return found
        if func in PRODUCTS:
            return shown(found, (found, 0.5)) if _both_activations(args) else found
        if func in ACTIVATIONS or func in GATES:
            passed = _passed("gate" if func in GATES else "activation", self.rules, args[0], found)
            return found if passed is None else passed
        return found


def _both_activations(args: Any) -> bool:
    """Whether both factors of a product depend on the input: a weight has one axis."""
    return all(isinstance(x, Tensor) and x.requires_grad and x.dim() > 1 and not x.is_leaf for x in args[:2])
