"""The matrix and the bias of a linear module, and the table of an embedding: what the module gives, not what it stores.

Adapters (LoRA, DoRA, IA3), quantised weights (8 and 4 bits), parametrizations and hooks make a module give something
else than the product with its `weight`. So a few seeded rows go through the module. If they come out as `x W + b` with
the stored weight, that weight is the answer. If not, unit vectors go through the module and give its effective matrix,
which is held to the seeded rows once more. A module that is not linear is refused.

Cost: three rows per module. An effective matrix takes as many rows as the module has inputs; the last ones are kept.
Its entries have the rounding of the module: an 8 bit module computes in float16, a 4 bit one in bfloat16 on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwater.lens.attention import module_hooks
from headwater.lens.errors import HeadwaterError, ModelError, named_line

ROWS, CHUNK = 3, 512
KEPT = 16  # effective matrices that are kept
ROUNDING = 8  # steps of float arithmetic that two orders of summation differ by
# largest relative difference of a linear module's output from its effective matrix, by what it computes in
LINEAR = {torch.float64: 1e-9, torch.float32: 1e-4}
COARSE, QUANTISED = 3e-2, 6e-2  # half precision; inputs that are rounded to 7 or 8 bits


class Linear(NamedTuple):
    """`y = x @ weight + bias`: weight [in, out], bias [out] or None. `stored`: these are the module's own tensors."""

    weight: Tensor
    bias: Tensor | None
    stored: bool


class _Effective(NamedTuple):
    seen: Tensor
    versions: tuple[Any, ...]
    found: Linear


_known: WeakKeyDictionary[nn.Module, _Effective] = WeakKeyDictionary()
_differentiable: WeakSet[nn.Module] = WeakSet()


def linear(module: nn.Module, where: str = "") -> Linear:
    """The matrix and bias of a linear module; ModelError names a module that is not linear, and `where` it stands.

    >>> import torch
    >>> found = linear(torch.nn.Linear(4, 6))
    >>> tuple(found.weight.shape), tuple(found.bias.shape), found.stored
    ((4, 6), (6,), True)
    """
    x = _probe(module)
    seen = _given(module, x)
    own = _stored(module)
    if own is not None and _is_product(x, own, seen):
        return own
    known, versions = _known.get(module), _versions(module)
    if known is not None and known.versions == versions and torch.equal(known.seen, seen):
        return known.found
    found = _effective(module, x, seen, where)
    _known.pop(module, None)
    for old in list(_known)[: len(_known) - KEPT + 1]:
        _known.pop(old, None)
    _known[module] = _Effective(seen, versions, found)
    return found


def outputs(module: nn.Module) -> int:
    """The number of features that a linear module gives."""
    return _given(module, _probe(module)[:1]).shape[-1]


def table(embedding: nn.Module, count: int) -> Tensor:
    """What an embedding gives for the ids 0 … count - 1, [count, d]: with its scale and its adapters."""
    device = next((t.device for t in embedding.parameters()), torch.device("cpu"))
    ids = torch.arange(count, device=device)
    return torch.cat([_given(embedding, part) for part in ids.split(2**14)])


def refuse_without_gradient(modules: Iterable[nn.Module]) -> None:
    """ModelError for a module that gives no gradient to its input, as torch's dynamic quantisation does."""
    for module in modules:
        plain = any(weight.dim() > 1 and _wide(weight) for weight in module.parameters())
        if plain or not isinstance(getattr(module, "in_features", None), int) or module in _differentiable:
            continue
        with torch.enable_grad(), module_hooks.off(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns where an operator has no gradient
            x = _probe(module)[:1].requires_grad_()
            y = module_hooks.first_output(module(x))
            if not y.requires_grad or torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None:
                raise ModelError(
                    f"{_name(module)} gives no gradient to its input, so nothing can be asked of gradients; load the "
                    "model without this quantisation"
                )
        _differentiable.add(module)


def quantised(modules: Iterable[nn.Module]) -> bool:
    """Whether a linear module among these computes with weights of few bits."""
    found = (module for module in modules if isinstance(getattr(module, "in_features", None), int))
    return any(_allowed(module, torch.empty(0)) == QUANTISED for module in found)


def _stored(module: nn.Module) -> Linear | None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not _wide(weight):
        return None
    return Linear(weight if isinstance(module, Conv1D) else weight.T, bias, True)


def _wide(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that can be used as they are: floating point of 16 bits or more."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _is_product(x: Tensor, own: Linear, seen: Tensor) -> bool:
    if x.shape[-1] != own.weight.shape[0]:
        return False
    product = nn.functional.linear(x, own.weight.T, own.bias).detach()
    if product.shape != seen.shape or product.dtype != seen.dtype:
        return False
    # in half precision a small adapter is no larger than rounding, so only the same bits will do
    exact = seen.dtype in LINEAR
    allowed = ROUNDING * torch.finfo(seen.dtype).eps if exact else 0.0
    return torch.equal(product, seen) or _distance(product, seen) <= allowed


def _effective(module: nn.Module, x: Tensor, seen: Tensor, where: str) -> Linear:
    width = x.shape[-1]
    bias = _given(module, x.new_zeros(1, width))[0]
    rows = []
    for start in range(0, width, CHUNK):
        unit = x.new_zeros(min(CHUNK, width - start), width)
        unit[torch.arange(len(unit)), start + torch.arange(len(unit))] = 1
        rows.append(_given(module, unit) - bias)
    weight = torch.cat(rows)
    off = _distance(x.double() @ weight.double() + bias.double(), seen)
    if not off <= _allowed(module, seen):
        raise ModelError(
            f"{_name(module, where)} is not linear: it differs by {off:.1e} from the product with its effective "
            "matrix, so it has no weights to be read (is dropout on, or an adapter with a nonlinearity?)"
        )
    return Linear(weight, bias if bias.any() else None, False)


def _allowed(module: nn.Module, seen: Tensor) -> float:
    tensors = [*module.parameters(), *module.buffers()]
    matrices = [t for t in tensors if t.dim() > 1 and _wide(t)]
    if not matrices or any(t.element_size() == 1 and t.dim() > 1 for t in tensors):
        return QUANTISED
    return max(LINEAR.get(t.dtype, COARSE) for t in (*matrices, seen))


def _probe(module: nn.Module) -> Tensor:
    """A few seeded rows of input."""
    weight = getattr(module, "weight", None)
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ModelError(
                f"{_name(module)} does not say how many inputs it has, so its weights are not read"
            )
        width = weight.shape[0 if isinstance(module, Conv1D) else 1]
    tensors = [*module.parameters(), *module.buffers()]
    like = next((t for t in tensors if t.dim() > 1 and _wide(t)), torch.empty(0))
    device = next((t.device for t in tensors), like.device)
    rows = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows.to(device, like.dtype)


def _given(module: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.no_grad(), module_hooks.off():
            return module_hooks.first_output(module(x)).detach()
    except HeadwaterError:
        raise
    except Exception as error:  # code of the module's own class
        raise ModelError(
            f"{_name(module)} does not take rows of {x.shape[-1]} numbers ({named_line(error):.150}), so "
            "its weights are not read"
        ) from None


def _distance(found: Tensor, expected: Tensor) -> float:
    """Length of the difference relative to that of the expected rows."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def _versions(module: nn.Module) -> tuple[Any, ...]:
    """What changes when a tensor of the module is written to or replaced."""
    tensors = (*module.parameters(), *module.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _name(module: nn.Module, where: str = "") -> str:
    kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    return f"{where} ({kind})" if where else kind
