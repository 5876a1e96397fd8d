"""Run a layer once more with functions of ours in the place of the ones that compute its recurrence.

The layer's own code prepares the arguments and goes on with what is returned: no family's projections, convolutions,
gates or norms are written here a second time. Its `forward` runs with global names of its own, so that neither the
module nor transformers is changed and other threads see nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from headwater.lens.attention.module_hooks import on
from headwater.lens.attention.standing_in import standing_in
from headwater.lens.errors import ModelError
from headwater.lens.mixers import forms
from headwater.lens.mixers.forms import Form

RECURRENCES: dict[str, Callable[[Mapping[str, Any]], Form]] = {
    "torch_chunk_gated_delta_rule": forms.gated_delta_rule,
    "chunk_kimi_delta_attention": forms.gated_delta_rule,
    "mamba2_chunk_scan": forms.state_space_by_head,
    "mamba_selective_scan": forms.state_space_by_channel,
}
CONVOLUTION = "causal_conv1d_fn"  # in front of a recurrence, or the mixing itself where there is none
CLOSE, ROUNDINGS = 1e-4, 4
# whole layers in one kernel: told that they have nothing to give, the layers call the functions above
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")


def known(module: nn.Module) -> bool:
    """Whether `observed` can read this module itself; the modules inside of it are not asked."""
    names = set(_forward(module).__code__.co_names)
    return bool(names & {*RECURRENCES, CONVOLUTION}) or _lru(module) is not None or _is_lightning(module)


def observed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Form, Tensor]:
    """The map of one call of a module, and what the module gives when its recurrence is computed from that map.

    The module runs without the cache that the call may have had: some models make one for every run, and the call has
    filled it. After an earlier text the two outputs differ, which the caller must look at.
    """
    args = tuple(None if isinstance(item, Cache) else item for item in args)
    kwargs = {name: None if isinstance(item, Cache) else item for name, item in kwargs.items()}
    lru = _lru(module)
    if lru is not None:
        return _with_lru(module, lru, args, kwargs)
    if _is_lightning(module):
        return _with_lightning(module, args, kwargs)
    return _with_functions(module, args, kwargs)


def _forward(module: nn.Module) -> FunctionType:
    return inspect.unwrap(type(module).forward)  # type: ignore[return-value]


def _with_functions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Form, Tensor]:
    forward = _forward(module)
    named = set(forward.__code__.co_names)
    asked = {name: make for name, make in RECURRENCES.items() if name in named}
    asked = asked or {CONVOLUTION: forms.short_convolution}
    met: list[Form] = []

    def instead(name: str) -> Callable[..., Any]:
        function = forward.__globals__[name]
        signature = inspect.signature(function)

        def answer(*given: Any, **named: Any) -> Any:
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            form = asked[name]({**named, **bound.arguments})
            for left_out in form.without:
                if left_out in bound.arguments:
                    bound.arguments[left_out] = None
                bound.arguments.get("kwargs", {}).pop(left_out, None)
            _hold_inner(form, function(*bound.args, **bound.kwargs), _dtype(args, kwargs))
            met.append(form)
            return form.answer()

        return answer

    names = {**forward.__globals__, **{name: instead(name) for name in asked}}
    names |= {name: lambda *_, **__: None for name in FUSED}
    code = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    code.__kwdefaults__ = forward.__kwdefaults__
    output = _tensor(code(module, *args, **kwargs))
    if not met:
        raise ModelError(f"it did not call {' or '.join(asked)}")
    return forms.joined(met), output


class _Lent:
    """Stands for a module as `self` in its own `forward`: `ours` are methods of ours, and what it stores stays here."""

    def __init__(self, module: nn.Module, **ours: Callable[..., Any]) -> None:
        self._module = module
        vars(self).update(ours)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _lru(module: nn.Module) -> nn.Module | None:
    return next((child for child in module.children() if hasattr(type(child), "_rnn_scan")), None)


def _with_lru(
    module: nn.Module, lru: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Form, Tensor]:
    signature = inspect.signature(type(lru)._rnn_scan)  # type: ignore[attr-defined]
    met: list[Form] = []

    def scan(*given: Any, **named: Any) -> Any:
        form = forms.real_gated_lru(signature.bind(lru, *given, **named).arguments)
        _hold_inner(form, lru._rnn_scan(*given, **named), _dtype(args, kwargs))  # type: ignore[operator]
        met.append(form)
        return form.answer()

    def instead(*given: Any, **named: Any) -> Any:
        return _forward(lru)(_Lent(lru, _rnn_scan=scan), *given, **named)

    with standing_in({lru: instead}):
        output = _tensor(_forward(module)(_Lent(module), *args, **kwargs))
    return met[0], output


def _is_lightning(module: nn.Module) -> bool:
    """MiniMax's layers compute their linear attention in `forward` itself, so they are known by what they hold."""
    return all(hasattr(module, name) for name in ("slope_rate", "qkv_proj", "act_fn", "norm", "head_dim"))


def _with_lightning(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Form, Tensor]:
    given = inspect.signature(_forward(module)).bind(module, *args, **kwargs).arguments
    mask = given.get("attention_mask")
    met: list[Form] = []

    def read(_: nn.Module, __: Any, ___: Any, projected: Tensor) -> None:
        states = module.act_fn(projected)  # type: ignore[operator]
        states = states if mask is None else (states * mask[:, :, None]).to(states)
        states = states.reshape(*states.shape[:2], -1, 3 * module.head_dim).transpose(1, 2)  # type: ignore[operator]
        met.append(forms.lightning_attention(*states.chunk(3, -1), module.slope_rate))  # type: ignore[arg-type]

    def lend(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        _hold_inner(met[0], given[0], given[0].dtype)
        return (met[0].answer(), *given[1:]), named

    with on(module.qkv_proj, after=read), on(module.norm, before=lend):  # type: ignore[arg-type]
        output = _tensor(_forward(module)(module, *args, **kwargs))
    return met[0], output


def _hold_inner(form: Form, own: Any, dtype: torch.dtype) -> None:
    """Hold `map @ values` to what the layer's function gives, head by head: beside a large skip, the layer's output
    would not show a wrong map."""
    ours, own = form.map @ form.values, form.take(own)
    worst, rounding = differing(ours, own, (0, 2, 3), dtype)
    if not bool((worst <= rounding).all()):
        raise ModelError(f"the map differs from the layer's own recurrence by {_size(worst, rounding)}")


def hold_output(ours: Tensor, own: Tensor) -> None:
    """Hold what a layer gives with the map to what it gave by itself."""
    worst, rounding = differing(ours, own, (0, 1, 2), own.dtype)
    if not bool(worst <= rounding):
        raise ModelError(f"with the map the layer's output differs from its own by {_size(worst, rounding)}")


def differing(ours: Tensor, own: Tensor, over: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest difference over some axes, and what rounding may make of it: 1e-4 of the largest number in float32,
    4 roundings of a coarser dtype that the layer computes in. Infinite where the shapes differ."""
    if ours.shape != own.shape:
        return torch.tensor(torch.inf), torch.tensor(0.0)
    share = max(CLOSE, ROUNDINGS * torch.finfo(dtype).eps)
    return (ours - own).abs().amax(over), share * own.abs().float().amax(over)


def _size(worst: Tensor, rounding: Tensor) -> str:
    place = int((worst - rounding).nan_to_num(torch.inf).argmax())
    return f"{float(worst.flatten()[place]):.1e}, where rounding is at most {float(rounding.flatten()[place]):.1e}"


def _dtype(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the hidden states that a layer was given."""
    states = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    return states.dtype


def _tensor(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    return found if torch.is_tensor(found) else torch.empty(0)
