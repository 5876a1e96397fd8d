"""What an edit of attention is, as tensors: it acts on scores, then on weights, then on a head's output.

`scores` s -> tau*s + bias, or -inf on a blocked set of pairs; `weights` P -> rescaled on a key set with the freed mass
handed to another, or mixed with the identity; `outputs` z -> gate*z, or replaced. The dense meaning of each stands in
`reference.py`. Head masks are bool [head]; positions are bool [batch|1, query] or [batch|1, key].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# a row whose target mass is smaller sees nothing of the target: dividing by it would overflow float32
NOTHING = 1e-30


@dataclass(frozen=True, eq=False)
class ScaleScores:
    """s -> tau*s for the chosen heads."""

    heads: Tensor
    tau: float

    def apply(self, scores: Tensor, rows: slice, columns: slice, batch: slice, heads: Tensor) -> Tensor:
        factor = torch.where(self.heads[heads], self.tau, 1.0).to(scores)
        return scores * factor[None, :, None, None]


@dataclass(frozen=True, eq=False)
class BlockScores:
    """s -> -inf on queries × keys of the chosen heads; what is left of the row is renormalised by the softmax."""

    heads: Tensor
    queries: Tensor
    keys: Tensor

    def apply(self, scores: Tensor, rows: slice, columns: slice, batch: slice, heads: Tensor) -> Tensor:
        queries = _rows_of(self.queries, batch)[:, rows]
        keys = _rows_of(self.keys, batch)[:, columns]
        blocked = (queries[:, None, :, None] & keys[:, None, None, :]) & self.heads[heads][
            None, :, None, None
        ]
        return scores.masked_fill(blocked.to(scores.device), float("-inf"))


@dataclass(frozen=True, eq=False)
class Rescale:
    """Weights on `keys` times `keep`; the freed mass goes to `to` in proportion to the weights there.

    A row with no mass on `to` (below 1e-30) is left as it was. `to` and `keys` do not overlap.
    """

    heads: Tensor
    keys: Tensor
    to: Tensor
    keep: float

    def resolve(
        self, weights: Tensor, columns: slice, batch: slice, heads: Tensor, own: Tensor
    ) -> tuple[Tensor, ...]:
        """The factors on `keys` and on `to`, each [batch, head, row], from all visible columns of the rows.

        `own` [batch|1, row] says where the row's own position is a real key.
        """
        keys = _rows_of(self.keys, batch)[:, columns].to(weights)
        to = _rows_of(self.to, batch)[:, columns].to(weights)
        freed = (1 - self.keep) * torch.einsum("bhqk,bk->bhq", weights, keys.expand(len(weights), -1))
        target = torch.einsum("bhqk,bk->bhq", weights, to.expand(len(weights), -1))
        acts = self.heads[heads].to(weights.device)[None, :, None] & (target > NOTHING)
        gain = 1 + freed / torch.where(acts, target, 1.0)
        return torch.where(acts, self.keep, 1.0).to(weights), torch.where(acts, gain, 1.0)

    def apply(
        self, weights: Tensor, factors: tuple[Tensor, ...], columns: slice, batch: slice, diagonal: Tensor
    ) -> Tensor:
        keep, gain = factors
        keys = _rows_of(self.keys, batch)[:, columns].to(weights)[:, None, None, :]
        to = _rows_of(self.to, batch)[:, columns].to(weights)[:, None, None, :]
        return weights * (1 + keys * (keep - 1)[..., None] + to * (gain - 1)[..., None])


@dataclass(frozen=True, eq=False)
class MixIdentity:
    """P -> (1-amount)*P + amount*I on rows whose own position is a real key."""

    heads: Tensor
    amount: float

    def resolve(
        self, weights: Tensor, columns: slice, batch: slice, heads: Tensor, own: Tensor
    ) -> tuple[Tensor, ...]:
        amount = torch.where(self.heads[heads], self.amount, 0.0).to(weights)[None, :, None]
        return ((amount * own.to(weights)[:, None]).expand(weights.shape[:-1]),)

    def apply(
        self, weights: Tensor, factors: tuple[Tensor, ...], columns: slice, batch: slice, diagonal: Tensor
    ) -> Tensor:
        amount = factors[0][..., None]
        return weights * (1 - amount) + amount * diagonal


@dataclass(frozen=True, eq=False)
class Gate:
    """z -> gate*z per head; `gate` [batch|1, head] or [batch|1, head, query] may carry a gradient.

    A gate of exactly 0 gives 0 even where z is infinite.
    """

    gate: Tensor

    def apply(self, output: Tensor, positions: Tensor) -> Tensor:
        gate = self.gate.to(output)
        gate = gate[..., None] if gate.dim() == 3 else gate[:, :, None, None]
        if gate.requires_grad:
            return output * gate
        return torch.where(gate == 0, torch.zeros_like(output), output * gate)


@dataclass(frozen=True, eq=False)
class ReplaceOutput:
    """z -> values on the chosen heads; `values` [sample, head, position|1, d_head] is read at the given positions.

    Batch row b takes sample b, and begins anew where there are fewer samples than rows.
    """

    heads: Tensor
    values: Tensor

    def apply(self, output: Tensor, positions: Tensor) -> Tensor:
        values = self.values.to(output)[torch.arange(len(output)) % len(self.values)]
        if values.shape[2] > 1:
            place = positions.expand(len(output), -1).clamp_min(0)[:, None, :, None]
            values = values.gather(
                2, place.to(values.device).expand(-1, *values.shape[1:2], -1, values.shape[3])
            )
        return torch.where(self.heads.to(output.device)[None, :, None, None], values, output)


ScoreEdit = ScaleScores | BlockScores
WeightEdit = Rescale | MixIdentity
OutputEdit = Gate | ReplaceOutput


@dataclass(frozen=True, eq=False)
class WeightStep:
    """A weight edit with the row factors that one forward pass gave it, each [batch, head, query].

    With its factors known, an edit is applied to any tile without looking at the rest of the row.
    """

    edit: WeightEdit
    factors: tuple[Tensor, ...]


def _rows_of(positions: Tensor, batch: slice) -> Tensor:
    return positions if positions.shape[0] == 1 else positions[batch]
