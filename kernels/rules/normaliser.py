"""`Normaliser` turns scores into weights: w_ij = f(s_ij) * exp(-L_i), with L_i = ln Z_i and Z_i the row's denominator.

| name | f(s) | Z | source |
|---|---|---|---|
| softmax | exp s | sum f | |
| softmax1 | exp s | 1 + sum f | softmax-off-by-one (Gu et al. 2025): a sink logit of 0 |
| sigmoid | sigma(s + bias) | 1 | FlashSigmoid (Ramapuram et al. 2024): training begins at bias = -ln(keys) |
| sigmoid_normalised | sigma(s + bias) | sum f | Gu et al. 2025 |
| cog | sign(s) exp(abs s) | sum of abs f | Cog attention (Lv et al. 2024) |
| softplus | ln(1 + exp s) | sum f + 1e-8 | LSSA's, with the scores as they are |
| lssa | as softplus | as softplus | Gao et al. 2025: s = ln(d) ln(N_i) cos(q, k), N_i visible keys |
| elu1 | elu(s) + 1 | sum f, or 1 | Gu et al. 2025 |
| linear | phi(q)·phi(k) | see below | Katharopoulos et al. 2020; Gu et al. 2025 |
| sinkhorn | exp(s + v_j) | sum f | Sinkformers (Sander et al. 2022): v from `kernels/rules/sinkhorn.py` |

Z of `linear` is sum f where phi is positive, max(abs of sum f, 1) where it may be negative (identity), or 1; cap,
biases and edits act on its products as on other scores, `scale` does not. Checked against public code: Gu et al.,
Sinkformers, FlashSigmoid, Cog; LSSA against a re-implementation. A hidden pair has weight exactly 0 under every one,
and a row without visible keys has no weights. A learned sink is one more key whose value is 0: it adds f(sink) to Z,
and has no part where Z is 1. L is one number per row; statistics call it `lse`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headwater.kernels.tiles.mask import HIDDEN

# what each name takes, at its default
PARAMETERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax1": {},
    "sigmoid": {"bias": 0.0},
    "sigmoid_normalised": {"bias": 0.0},
    "cog": {},
    "softplus": {},
    "lssa": {},
    "elu1": {"normalise": True},
    "linear": {"features": "elu1", "normalise": True},
    "products": {"features": "elu1", "normalise": True},
    "sinkhorn": {"iterations": 3},
}
FEATURES = {"elu1": lambda x: functional.elu(x) + 1, "relu": functional.relu, "identity": lambda x: x}
Z_EPSILON = 1e-8  # added to the denominator of softplus weights


@dataclass(frozen=True)
class Normaliser:
    """A way from scores to weights by its name in the table above, with the parameters it takes; others stay None.

    `bias` is added to the scores of a sigmoid; `iterations` of Sinkhorn is odd, so that the rows are normalised last;
    `features` are those of `linear`: "elu1", "relu" or "identity"; `normalise=False` sets Z to 1. "products" is what
    `linear` is once its features are taken: f(s) = s. ValueError where a name or a parameter does not exist.
    """

    name: str
    bias: float | None = None
    iterations: int | None = None
    features: str | None = None
    normalise: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in PARAMETERS:
            raise ValueError(f"unknown normaliser {self.name!r}; there are {', '.join(PARAMETERS)}")
        takes = PARAMETERS[self.name]
        for field in ("bias", "iterations", "features", "normalise"):
            given = getattr(self, field)
            if given is None:
                object.__setattr__(self, field, takes.get(field))
            elif field not in takes:
                raise ValueError(
                    f"{self.name} takes {', '.join(takes) or 'no parameters'}; got {field}={given!r}"
                )
        if self.bias is not None and not math.isfinite(self.bias):
            raise ValueError(f"the bias of {self.name} must be a finite number; got {self.bias}")
        if self.iterations is not None and (self.iterations < 1 or self.iterations % 2 == 0):
            raise ValueError(
                f"sinkhorn takes an odd number of iterations, which ends with rows that sum to 1; got {self.iterations}"
            )
        if self.features is not None and self.features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}; got {self.features!r}")

    @property
    def unnormalised(self) -> bool:
        """Whether Z is 1, so that rows sum to whatever their scores give."""
        return self.name == "sigmoid" or self.normalise is False

    @property
    def bounded(self) -> bool:
        """Whether no weight exceeds 1 in size."""
        return self.name not in ("linear", "products") and not (self.name == "elu1" and self.unnormalised)

    def logs(self, scores: Tensor) -> Tensor:
        """ln|f(s)|, so that no score overflows; -inf on hidden pairs. A new tensor."""
        if self.name in ("sigmoid", "sigmoid_normalised"):
            assert self.bias is not None
            return functional.logsigmoid(scores + self.bias)
        if self.name == "softplus":
            # ln(ln(1 + x)) = s - x/2 + 5x²/24 - … for x = exp(s), which the plain formula loses to underflow
            small = scores.clamp(max=-15).exp()
            large = scores.clamp(min=-15)
            plain = torch.logaddexp(large, torch.zeros_like(large)).log()
            return torch.where(scores < -15, scores - small / 2 + 5 * small.square() / 24, plain)
        if self.name == "elu1":
            return torch.where(scores < 0, scores, scores.clamp(min=0).log1p())
        hidden = scores == HIDDEN
        size = scores.masked_fill(hidden, 0.0).abs()
        return (size if self.name == "cog" else size.log()).masked_fill(hidden, HIDDEN)

    def row_constant(self, scores: Tensor, sink: Tensor | None) -> Tensor:
        """L of whole rows of masked scores; -inf on rows without weights. `sink` broadcasts to the rows."""
        silent = (scores == HIDDEN).all(-1)
        if self.unnormalised:
            return torch.zeros_like(silent, dtype=scores.dtype).masked_fill(silent, HIDDEN)
        if self.name == "products":
            total = scores.masked_fill(scores == HIDDEN, 0.0).sum(-1)
            total = (total if sink is None else total + sink).abs()
            if self.features == "identity":
                total = total.clamp(min=1)
            silent = silent | (total == 0)
            return total.masked_fill(silent, 1.0).log().masked_fill(silent, HIDDEN)
        found = self.logs(scores).logsumexp(-1)
        if self.name == "softplus":
            found = torch.logaddexp(found, torch.full_like(found, math.log(Z_EPSILON)))
        if sink is not None:
            found = torch.logaddexp(found, self.logs(sink.to(found)).expand_as(found))
        return found.masked_fill(silent, HIDDEN)

    def weights(self, scores: Tensor, row: Tensor) -> Tensor:
        """f(s) * exp(-L) of any tile of masked scores; `row` is L, with a last axis of 1, +inf on rows without any."""
        if self.name == "products":
            return scores.masked_fill(scores == HIDDEN, 0.0) * torch.exp(-row)
        logs = self.logs(scores) - row
        if self.bounded:
            # no weight exceeds 1: where scores are large the rounding of L would say otherwise
            logs = logs.clamp(max=0)
        return logs.exp() * scores.sign() if self.name == "cog" else logs.exp()
