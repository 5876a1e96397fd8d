"""Weight edits as the Triton kernels take them: a factor per row and class of keys, and mass kept on the own position.

Keys that belong to the same sets of every edit form a class, so after any sequence of edits the weight is
`F_i(class of j) * p_ij`, plus `d_i` where j is i's own position. The masses of the classes, which one pass gives,
settle all factors by arithmetic on [batch, head, query] tensors: exact, whatever the edits, for up to 16 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.kernels.edits import NOTHING, MixIdentity, Rescale, WeightEdit, WeightStep
from headwater.kernels.rule import ScoreRule

MOST_CLASSES = 16
FEW = 16  # neighbouring keys that are cheaper to treat one by one than in another walk


@dataclass(frozen=True, eq=False)
class KeyClasses:
    """`of_key` int32 [batch|1, key]; `keys[e][c]` and `to[e][c]`: is class c in the sets of edit e."""

    of_key: Tensor
    count: int
    keys: list[list[bool]]
    to: list[list[bool]]

    def groups(self) -> Tensor:
        """The classes as groups of keys, bool [batch|1, class, key]."""
        return self.of_key[:, None] == torch.arange(self.count, device=self.of_key.device)[:, None]

    def most(self) -> int:
        """The class of most keys."""
        return int(self.of_key.flatten().bincount(minlength=self.count).argmax())

    def few(self) -> tuple[int, int] | None:
        """The columns `first:last` that hold all other classes, where they are few; None where they are not."""
        other = (self.of_key != self.most()).any(0).nonzero()[:, 0]
        if not len(other):
            return 0, 1
        first, last = int(other[0]), int(other[-1]) + 1
        return (first, last) if last - first <= FEW else None


@dataclass(frozen=True, eq=False)
class Folded:
    """All edits of a map as `factor` [batch, head, class, query] and `kept` [batch, head, query], float32."""

    classes: KeyClasses
    factor: Tensor
    kept: Tensor


def classify(edits: Sequence[WeightEdit], keys: int, device: torch.device) -> KeyClasses:
    """Number the combinations of sets that occur; class 0 where no edit names any key."""
    code = torch.zeros(1, keys, dtype=torch.long, device=device)
    for edit in edits:
        place = torch.zeros((), dtype=torch.long, device=device)
        if isinstance(edit, Rescale):
            place = edit.keys.to(device).long() + 2 * edit.to.to(device).long()
        code = code * 3 + place
    values, of_key = code.unique(return_inverse=True)
    memberships = []
    for _ in edits:
        memberships.append((values % 3).tolist())
        values = values // 3
    memberships.reverse()
    return KeyClasses(
        of_key.to(torch.int32),
        len(memberships[0]) if edits else 1,
        [[place == 1 for place in row] for row in memberships],
        [[place == 2 for place in row] for row in memberships],
    )


def fold(
    edits: Sequence[WeightEdit],
    classes: KeyClasses,
    rule: ScoreRule,
    mass: Tensor | None = None,
    factors: Sequence[tuple[Tensor, ...]] | None = None,
) -> tuple[Folded, tuple[WeightStep, ...]]:
    """The edits in their order, from the masses of the classes [batch, head, class, query] or from saved factors."""
    if mass is None:
        assert factors is not None
        batch, heads, queries = factors[0][0].shape
        device = factors[0][0].device
    else:
        batch, heads, _, queries = mass.shape
        device = mass.device
    factor = torch.ones(batch, heads, classes.count, queries, device=device)
    kept = torch.zeros(batch, heads, queries, device=device)
    own = rule.mask.own_key().to(device)[:, None]
    place = (torch.arange(queries, device=device) + rule.mask.shift).clamp(0, max(rule.mask.keys - 1, 0))
    own_class = classes.of_key[:, place].long()[:, None]

    steps = []
    for e, edit in enumerate(edits):
        saved = None if factors is None else tuple(f.float() for f in factors[e])
        if isinstance(edit, MixIdentity):
            if saved is None:
                amount = torch.where(edit.heads.to(device), edit.amount, 0.0)[None, :, None]
                saved = ((amount * own).expand(batch, heads, queries).float(),)
            factor = factor * (1 - saved[0])[:, :, None]
            kept = kept * (1 - saved[0]) + saved[0]
        else:
            keys = torch.tensor(classes.keys[e], device=device)
            to = torch.tensor(classes.to[e], device=device)
            if saved is None:
                assert mass is not None
                saved = _settle(edit, factor * mass, kept, keys, to, own_class)
            keep, gain = saved
            change = torch.where(
                keys[:, None], keep[:, :, None], torch.where(to[:, None], gain[:, :, None], 1.0)
            )
            factor = factor * change
            kept = kept * change.gather(2, own_class[:, :, None].expand(batch, heads, 1, queries))[:, :, 0]
        steps.append(WeightStep(edit, saved))
    return Folded(classes, factor.contiguous(), kept.contiguous()), tuple(steps)


def _settle(
    edit: Rescale, mass: Tensor, kept: Tensor, keys: Tensor, to: Tensor, own_class: Tensor
) -> tuple[Tensor, Tensor]:
    """The factors on `keys` and on `to` of one edit, [batch, head, query], as `Rescale.resolve` defines them."""
    on_keys = torch.where(keys[:, None], mass, 0.0).sum(2) + kept * keys[own_class]
    target = torch.where(to[:, None], mass, 0.0).sum(2) + kept * to[own_class]
    acts = edit.heads.to(mass.device)[None, :, None] & (target > NOTHING)
    gain = 1 + (1 - edit.keep) * on_keys / torch.where(acts, target, 1.0)
    return torch.where(acts, edit.keep, 1.0), torch.where(acts, gain, 1.0)
