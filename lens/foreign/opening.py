"""`open_module`: a module outside transformers as a `ForeignModel`, held to its own output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from headwater.lens.errors import ModelError
from headwater.lens.foreign.arguments import Arguments, numbers_in
from headwater.lens.foreign.divide import divide, unread
from headwater.lens.foreign.meeting import AttentionCall, Key, Met
from headwater.lens.foreign.model import ForeignModel
from headwater.lens.foreign.module import ForeignModule, said
from headwater.lens.foreign.named_axes import AxisNames, NamedAxes
from headwater.lens.foreign.sources import told_apart
from headwater.lens.models.closeness import relative_difference
from headwater.lens.models.parts import Part
from headwater.lens.running.placed import refuse_divided

ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-3}
COARSE = 5e-2


class Kind:
    """How a module outside transformers is read: the class of the open model, its parts and the names of its axes."""

    model: type[ForeignModel] = ForeignModel

    def divide(
        self, hf: ForeignModule, met: Mapping[Key, Met]
    ) -> tuple[dict[str, Part], dict[Key, AttentionCall]]:
        return divide(told_apart(hf, met), hf.batch)

    def names(self, hf: ForeignModule, parts: Mapping[str, Part]) -> AxisNames | None:
        """The names of tokens where the user gives none."""
        return None


def open_module(module: nn.Module, sample: Any, axes: Any = None, kind: Kind | None = None) -> ForeignModel:
    """Open a module in memory by a `sample` of what its `forward` takes; it is put into eval mode. `axes` name axes
    and tokens of parts (named_axes.py).

    ModelError if it is compiled, fails on the sample, calls `scaled_dot_product_attention` nowhere, or gives other
    numbers when Headwater computes its attention.
    """
    name = type(module).__name__
    _refuse_unfit(module, name, sample)
    module.eval()
    hf = ForeignModule(module, Arguments(module, sample))
    hf.eval()
    before = _plain(hf, name)
    with said(name):
        met = hf.learn()
    if not met:
        raise ModelError(
            f"no call of scaled_dot_product_attention was met when {name} ran on the sample; attention that a module "
            "computes by hand, or by a library of its own, can not be read"
        )
    kind = Kind() if kind is None else kind
    parts, sites = kind.divide(hf, met)
    given = None if axes is None else NamedAxes(axes, parts)
    if given is not None:
        parts = given.renamed(parts)
    hf.named = kind.names(hf, parts) if given is None else given
    hf.stand_on(sites, {part: next(iter(each.modules)).key for part, each in parts.items()})  # type: ignore[misc]
    model = kind.model(hf, None, parts, name, unread=unread(module, met))
    if given is not None:
        given.fit(hf.measured(hf.arguments.tensors, next(iter(parts))))
    torch.manual_seed(0)
    with torch.no_grad(), said(name):
        after = list(numbers_in(hf(**hf.arguments.tensors)))
    if _differs(before, after):  # torch's fused layers give other numbers on padding than their steps
        with BaseTorchFunctionMode():
            before = _plain(hf, name)
    if (difference := _differs(before, after)) is not None:
        raise ModelError(
            f"{name} gives other numbers when Headwater computes its attention (relative difference {difference}); it "
            "can not be read"
        )
    return model


def _refuse_unfit(module: nn.Module, name: str, sample: Any) -> None:
    if sample is None:
        raise ModelError(
            f"{name} is not a model of transformers; to open its attention give what its forward takes: "
            "hw.load(module, sample=tensor), or a tuple or dictionary of arguments"
        )
    inner = getattr(module, "_orig_mod", None)
    if inner is not None or any(getattr(each, "_compiled_call_impl", None) for each in module.modules()):
        raise ModelError(
            f"{type(inner or module).__name__} is compiled; load() the module before torch.compile"
        )
    refuse_divided(module.named_parameters(), name)
    for path, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_meta:
            raise ModelError(
                f"{path} of {name} is on the meta device and holds no numbers; load its weights first"
            )
        if weight.is_floating_point() and not weight.isfinite().all() and isinstance(weight, nn.Parameter):
            raise ModelError(
                f"{path} of {name} holds NaN or infinite values; take another copy of the weights"
            )


def _plain(hf: ForeignModule, name: str) -> list[Tensor]:
    """The numbers that the module itself gives on the sample."""
    torch.manual_seed(0)  # a module may draw numbers, and two runs are compared
    args, kwargs = hf.arguments.filled(hf.arguments.tensors)
    with torch.no_grad(), said(name):
        found = list(numbers_in(hf.module(*args, **kwargs)))
    if not found:
        raise ModelError(f"{name} returns no floating-point tensor, so its outputs can not be compared")
    return found


def _differs(before: list[Tensor], after: list[Tensor]) -> str | None:
    """The largest relative difference, in words; None where the numbers agree. Numbers that the module itself gives as
    NaN (rows that see no key) are not compared."""
    if [each.shape for each in before] != [each.shape for each in after]:
        return "of the shapes"
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        real = old.isfinite()
        difference = relative_difference(new[real], old[real], 1.0) if real.any() else 0.0
        if not difference <= ALLOWED.get(old.dtype, COARSE):
            worst = max(worst, difference) if difference == difference else float("nan")
    return f"{worst:.1e}" if worst else None
