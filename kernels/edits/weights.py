"""Edits of weights: factors on sets of keys, and mixing with the identity or with a given pattern.

Each comes to a few numbers per row (`resolve`, which needs the whole row) and then applies to any tile without looking
at the rest of the row (`apply`); `WeightStep` keeps both. `heads` is bool [head] or [batch|1, head]; `rows`, bool
[batch|1, head|1, query], limits an edit to some queries. A row without weights (every key hidden) stays without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.kernels.edits.mixing import MixHeads
from headwater.kernels.edits.patterns import Pattern
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

# a row whose target mass is smaller sees nothing of the target: dividing by it would overflow float32
NOTHING = 1e-30
# added to the denominator of mass(of) / mass(within), so that a row with no weight in `within` has share 0
WITHIN_EPSILON = 1e-6
# added to the sum of a row's absolute weights
ROW_EPSILON = 1e-8


@dataclass(frozen=True, eq=False)
class RowCondition:
    """Rows where mass(of)/(mass(within) + 1e-6) <= most and mass(within) >= least.

    The masses are sums of the weights as they are when the edit's turn comes; `of` and `within` are bool
    [batch|1, key]. VAR (Kang et al. 2025) chooses its image-centric rows so; its code adds 1e-6 to every weight.
    """

    of: Tensor
    within: Tensor
    most: float
    least: float

    def holds(self, weights: Tensor, block: Block) -> Tensor:
        """bool [batch, head, row]."""
        within = _mass(weights, self.within, block)
        share = _mass(weights, self.of, block) / (within + WITHIN_EPSILON)
        return (share <= self.most) & (within >= self.least)


@dataclass(frozen=True, eq=False)
class Rescale:
    """Weights on `keys` times `keep`; the freed mass goes to `to` in proportion to the weights there.

    A row with no mass on `to` (below 1e-30) is left as it was. `to` and `keys` do not overlap.
    `keep` is between 0 and 1, else ValueError: beyond, weights turn negative, which statistics do not expect.
    """

    heads: Tensor
    keys: Tensor
    to: Tensor
    keep: float
    rows: Tensor | None = None
    condition: RowCondition | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep must be between 0 and 1; got {self.keep}")

    def resolve(self, weights: Tensor, block: Block, mask: Mask, live: Tensor) -> tuple[Tensor, ...]:
        """The factors on `keys` and on `to`, each [batch, head, row], from all visible columns of the rows.

        `live`, bool [batch, head, row], marks the rows that have weights.
        """
        freed = (1 - self.keep) * _mass(weights, self.keys, block)
        target = _mass(weights, self.to, block)
        acts = _acts(self, block, weights) & live & (target > NOTHING)
        if self.condition is not None:
            acts = acts & self.condition.holds(weights, block)
        gain = 1 + per_mass(freed, torch.where(acts, target, 1.0))
        return torch.where(acts, weights.new_tensor(self.keep), 1.0), torch.where(acts, gain, 1.0)

    def apply(self, weights: Tensor, factors: tuple[Tensor, ...], block: Block, mask: Mask) -> Tensor:
        keep, gain = factors
        keys, to = (block.of_keys(some).to(weights) for some in (self.keys, self.to))
        return weights * (1 + keys * (keep - 1)[..., None] + to * (gain - 1)[..., None])


@dataclass(frozen=True, eq=False)
class ScaleKeys:
    """Weights on `keys` times `factor`; nothing is renormalised, so rows no longer sum to what they did."""

    heads: Tensor
    keys: Tensor
    factor: float
    rows: Tensor | None = None

    @property
    def signed(self) -> bool:
        return self.factor < 0

    def resolve(self, weights: Tensor, block: Block, mask: Mask, live: Tensor) -> tuple[Tensor, ...]:
        """The factor of each row, 1 where it keeps its weights."""
        acts = (_acts(self, block, weights) & live).expand(weights.shape[:-1])
        return (torch.where(acts, weights.new_tensor(self.factor), 1.0),)

    def apply(self, weights: Tensor, factors: tuple[Tensor, ...], block: Block, mask: Mask) -> Tensor:
        return torch.where(
            block.of_keys(self.keys).to(weights.device), weights * factors[0][..., None], weights
        )


@dataclass(frozen=True, eq=False)
class MixIdentity:
    """P -> (1-amount)*P + amount*I on rows whose own position is a real key that the band shows."""

    heads: Tensor
    amount: float
    rows: Tensor | None = None

    def resolve(self, weights: Tensor, block: Block, mask: Mask, live: Tensor) -> tuple[Tensor, ...]:
        own = block.of_rows(mask.own_key()[:, None]).to(weights.device)
        return ((_acts(self, block, weights) & live & own).to(weights) * self.amount,)

    def apply(self, weights: Tensor, factors: tuple[Tensor, ...], block: Block, mask: Mask) -> Tensor:
        amount = factors[0][..., None]
        rows, columns = block.positions(weights.device)
        return weights * (1 - amount) + amount * (rows + mask.shift == columns)


@dataclass(frozen=True, eq=False)
class MixPattern:
    """P -> (1-amount)*P + amount*T on the rows where the pattern T has mass; other rows are left as they were."""

    heads: Tensor
    amount: float
    pattern: Pattern
    rows: Tensor | None = None

    def resolve(self, weights: Tensor, block: Block, mask: Mask, live: Tensor) -> tuple[Tensor, ...]:
        """The amount of each row, and what the pattern's tile is multiplied by: [batch, head, row] each."""
        mass = self.pattern.tile(block, mask, weights).sum(-1).expand(weights.shape[:-1])
        acts = _acts(self, block, weights) & live & (mass > 0)
        amount = acts.to(weights) * self.amount
        return amount, amount if self.pattern.as_it_is else amount / torch.where(acts, mass, 1.0)

    def apply(self, weights: Tensor, factors: tuple[Tensor, ...], block: Block, mask: Mask) -> Tensor:
        amount, share = factors
        return weights * (1 - amount)[..., None] + share[..., None] * self.pattern.tile(block, mask, weights)


@dataclass(frozen=True, eq=False)
class Shares:
    """P -> |P| / (sum of |P| over the row + 1e-8): what share of a row's attention a key has, whatever the row sums to.

    The proxy that Gu et al. 2025 measure sinks on where rows do not sum to 1 or weights are negative.
    """

    heads: Tensor
    rows: Tensor | None = None

    def resolve(self, weights: Tensor, block: Block, mask: Mask, live: Tensor) -> tuple[Tensor, ...]:
        """The factor of each row, or -1 where the row keeps its weights."""
        share = 1 / (weights.abs().sum(-1) + ROW_EPSILON)
        return (torch.where(_acts(self, block, weights) & live, share, -1.0),)

    def apply(self, weights: Tensor, factors: tuple[Tensor, ...], block: Block, mask: Mask) -> Tensor:
        factor = factors[0][..., None]
        return torch.where(factor < 0, weights, weights.abs() * factor)


PlainWeightEdit = Rescale | ScaleKeys | MixIdentity | MixPattern | Shares
WeightEdit = PlainWeightEdit | MixHeads


@dataclass(frozen=True, eq=False)
class WeightStep:
    """A weight edit with the row factors that one forward pass gave it, each [batch, head, query].

    With its factors known, an edit is applied to any tile without looking at the rest of the row.
    """

    edit: WeightEdit
    factors: tuple[Tensor, ...]


def per_mass(freed: Tensor, target: Tensor) -> Tensor:
    """freed / target. Its slope 1 / target² would be infinite in float32 below 1e-19: half the way each time."""
    size = target.detach()
    return (freed / size) / (target / size)


def _acts(edit: PlainWeightEdit, block: Block, weights: Tensor) -> Tensor:
    """Heads and rows that the edit names, bool broadcastable to [batch, head, row]."""
    acts = block.of_heads(edit.heads)[..., 0].to(weights.device)
    return acts if edit.rows is None else acts & block.of_rows(edit.rows).to(weights.device)


def _mass(weights: Tensor, keys: Tensor, block: Block) -> Tensor:
    """Sum of the weights on a set of keys, [batch, head, row]."""
    inside = block.of_keys(keys)[:, 0, 0].to(weights).expand(len(weights), -1)
    return torch.einsum("bhqk,bk->bhq", weights, inside)
