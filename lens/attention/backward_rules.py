"""Rules of a backward pass: what takes the place of the gradient in norms, activations, products and attention.

A rule set changes what flows back and never what a model gives. It is switched on in a context variable. Attention asks
for it here (`function.py`), norms, activations and products in `running/backward_pass.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from headwater.kernels.attend import attend
from headwater.kernels.edits.scores import ScaleScores
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule
from headwater.lens.errors import ModelError

Given = ParamSpec("Given")
Result = TypeVar("Result")
BackwardRule = Literal["gradient", "relp", "relp_released", "gim", "attnlrp"]


@dataclass(frozen=True)
class Rules:
    """One rule set.

    `ratio`: an activation f passes f(x)/x in the place of f'(x). One that is not 0 at 0 (a sigmoid), and the softmax of
    a router, are constants. `scores` and `values` multiply the gradient that attention hands to its queries and keys,
    and to its values; 0 holds the weights constant. `temperature` divides the scores of the softmax whose slope is
    taken. In all sets norms divide by a constant, and a product of two activations hands each factor half.
    """

    ratio: bool
    scores: float
    values: float
    temperature: float = 1.0


RULES: dict[str, Rules] = {
    "relp": Rules(ratio=True, scores=0.0, values=1.0),
    "relp_released": Rules(ratio=True, scores=1.0, values=1.0),
    "gim": Rules(ratio=False, scores=0.25, values=0.5, temperature=2.0),
    "attnlrp": Rules(ratio=True, scores=0.25, values=0.5),
}
_rules: ContextVar[Rules | None] = ContextVar("headwater_backward_rules", default=None)
_paused: ContextVar[bool] = ContextVar("headwater_backward_paused", default=False)


@contextlib.contextmanager
def following(rule: BackwardRule) -> Iterator[None]:
    """Inside, backward passes through what Headwater runs follow the rule set of this name."""
    token = _rules.set(RULES.get(rule))
    try:
        yield
    finally:
        _rules.reset(token)


def current() -> Rules | None:
    """The rule set that is on and not paused; None for the plain gradient."""
    return None if _paused.get() else _rules.get()


def constant(x: Tensor) -> Tensor:
    """What the scale of a norm is computed from: without its gradient where rules are on."""
    return x if current() is None else x.detach()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Inside, products and activations are plain: the arithmetic of attention itself."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def plainly(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function, which runs inside `paused`; without its generator, as attention is called for every layer."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        token = _paused.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _paused.reset(token)

    return run


class _Shown(torch.autograd.Function):
    """A value that hands its gradient, times a factor each, to other tensors of its shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factors: Sequence[float], *others: Tensor) -> Tensor:
        ctx.factors = factors
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *(grads[0] if f == 1.0 else f * grads[0] for f in ctx.factors)


def shown(value: Tensor, *others: tuple[Tensor, float]) -> Tensor:
    """`value` bit for bit; its gradient goes to the others, each with its factor, and not to what made it."""
    found = [(other, factor) for other, factor in others if other.requires_grad and factor]
    if not found:
        return value.detach()
    tensors, factors = zip(*found, strict=True)
    return cast(Tensor, _Shown.apply(value.detach(), factors, *tensors))


def attended(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[WeightEdit],
    backend: str, statistics: Sequence[str], differentiable: bool,
) -> tuple[Tensor, AttentionMap]:  # fmt: skip
    """What `attend` gives; the gradient of z follows the rules."""
    z, map = attend(q, k, v, rule, edits, backend, statistics, differentiable)
    rules = _rules.get()
    if rules is None or not z.requires_grad:
        return z, map
    by_value = attend(q.detach(), k.detach(), v, rule.detached(), edits, backend)[0]
    slopes = [(by_value, rules.values)]
    if rules.scores:
        warm = _warmer(rule, q.shape[1], rules.temperature)
        by_score = attend(q, k, v.detach(), warm, edits, backend)[0]
        # the slope of softmax(s / T) is taken with respect to s / T, as in the authors' code
        slopes.append((by_score, rules.scores * rules.temperature))
    return shown(z, *slopes), map


def _warmer(rule: ScoreRule, heads: int, temperature: float) -> ScoreRule:
    """The rule with its scores, and those of a learned sink, divided by the temperature."""
    if temperature == 1.0:
        return rule
    if rule.normaliser is not None:
        raise ModelError(
            f"a temperature of the backward pass is for the softmax, and these weights come from the "
            f"{rule.normaliser.name} normaliser; take relp or attnlrp"
        )
    divided = ScaleScores(torch.ones(heads, dtype=torch.bool), 1 / temperature)
    sinks = None if rule.sinks is None else rule.sinks / temperature
    return replace(rule, edits=(*rule.edits, divided), sinks=sinks)
