"""The mass of attention on impermissible tokens, and the loss that hides it.

Pruthi et al. 2020 (arXiv 1909.07913) train a classifier that uses words on which its attention puts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

LARGEST = 1 - 1e-8  # of a mass whose rest is taken the logarithm of; below double precision it is 1


def marked(record: Record, words: str | Iterable[str]) -> Bool[Tensor, "batch key"]:
    """The tokens of a record that are one of `words`, without regard to capitals; padding is none.

    A word in several tokens is not found. AnalysisError where no token of the record is one of them.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("Mary gave John a drink")
    >>> hw.losses.marked(record, "Mary John").nonzero()[:, 1].tolist()
    [1, 3]
    """
    wanted = {word.casefold() for word in (words.split() if isinstance(words, str) else words)}
    keys = record.key_axis
    found = torch.tensor([[text.strip("Ġ▁ ").casefold() in wanted for text in row] for row in keys.strings])
    found = found & keys.valid.cpu()
    if not found.any():
        raise AnalysisError(f"no token of the record is one of {', '.join(sorted(wanted))}")
    return found


def impermissible_mass(
    weights: Float[Tensor, "*heads query key"], tokens: Bool[Tensor, "batch key"]
) -> Float[Tensor, "*heads query"]:
    """M = Σ_j m_j · α_j, the attention of each row on the marked `tokens`; `weights` are [batch, head, query, key].

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("Mary gave John a drink")
    >>> mass = hw.losses.impermissible_mass(record.pattern(0), hw.losses.marked(record, "Mary"))
    >>> mass.shape  # [batch, head, query]
    torch.Size([1, 8, 6])
    """
    tokens = torch.as_tensor(tokens)
    fits = weights.dim() >= 3 and tokens.shape == (weights.shape[0], weights.shape[-1])
    if not fits or tokens.dtype != torch.bool:
        raise AnalysisError(
            f"tokens are bool [batch, key] of weights [batch, head, query, key]; got {tokens.dtype} "
            f"{list(tokens.shape)} for {list(weights.shape)}"
        )
    return torch.einsum("b...qk, bk -> b...q", weights, tokens.to(weights))


def hiding_loss(
    mass: Float[Tensor, "batch *heads query"],
    strength: float = 1.0,
    how: Literal["mean", "max"] = "mean",
    rows: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, " batch"]:
    """R = −λ · mean log(1 − M) over the heads and rows of each example, [batch]; with "max" that of the largest M.

    `mass` is that of `impermissible_mass`, cut to the rows that are punished (`mass[..., :1]` for a class token, as in
    the paper, in the last layer); `rows` leaves out rows of padding and others. `strength` is λ, 0.1 or 1 in the paper.
    M is at most 1 − 1e-8, or the number before 1 of a lower precision, since the gradient at 1 is infinite.
    Checked against the authors' code: its "max" is over the whole batch, which is the maximum of this [batch].

    >>> import headwater as hw, torch
    >>> hw.losses.hiding_loss(torch.tensor([[[0.5, 0.0]], [[0.0, 0.0]]])).round(decimals=2)
    tensor([0.3500, 0.0000])
    """
    if how not in ("mean", "max"):
        raise AnalysisError(f"how is 'mean' or 'max'; got {how!r}")
    if mass.dim() < 2 or (
        rows is not None and (rows.dtype != torch.bool or rows.shape != (len(mass), mass.shape[-1]))
    ):
        given = None if rows is None else f"{rows.dtype} {list(rows.shape)}"
        raise AnalysisError(
            f"mass is [batch, head, query] and rows bool [batch, query] of it; got {list(mass.shape)} and {given}"
        )
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise AnalysisError(f"strength is a finite number such as 0.1; got {strength!r:.40}")
    largest = LARGEST if mass.dtype == torch.float64 else 1 - torch.finfo(mass.dtype).eps / 2
    taken = torch.ones_like(mass, dtype=torch.bool)
    if rows is not None:
        taken = rows.reshape(len(rows), *[1] * (mass.dim() - 2), rows.shape[-1]).expand_as(mass)
    rest = -torch.log1p(-torch.where(taken, mass, 0.0).clamp(max=largest)).flatten(1)
    if how == "max":
        return strength * rest.amax(1)
    return strength * rest.sum(1) / taken.flatten(1).sum(1).clamp_min(1)
