"""Weight edits in the form of fused kernels: a factor per row and class of keys, and mass kept on the own position.

Keys that belong to the same sets of every edit form a class, so after any sequence of edits the weight is
`F_i(class of j) * p_ij`, plus `d_i` where j is i's own position, plus `G_i(class of j) * t_ij` for each pattern t that
was mixed in. One pass gives the masses of the classes; they determine all factors by arithmetic on [batch, head, query]
tensors: exact, whatever the edits, for up to 16 classes. Kernels compute the first two terms; the products with the
patterns (kernels/backends/pattern_products.py) are added to theirs.

Example: four keys, one edit that halves the weights on key 0 and hands the freed mass to keys 2 and 3. Key 0 is in
`keys`, keys 2 and 3 are in `to`, key 1 is in neither: three classes, numbered by their membership.

    of_key = [2, 0, 1, 1]        inside[0, "keys"] = [F, F, T]        inside[0, "to"] = [F, T, F]

A row with the weights [0.6, 0.2, 0.1, 0.1] has the class masses [0.2, 0.2, 0.6]. It frees 0.5 * 0.6 = 0.3, so the
factors of the classes are [1, 1 + 0.3 / 0.2, 0.5] = [1, 2.5, 0.5], and the edited row is [0.3, 0.2, 0.25, 0.25].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.kernels.backends import pattern_products
from headwater.kernels.edits.patterns import Pattern
from headwater.kernels.edits.weights import (
    NOTHING,
    WITHIN_EPSILON,
    MixIdentity,
    MixPattern,
    Rescale,
    WeightEdit,
    WeightStep,
    per_mass,
)
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import tile_dtype
from headwater.kernels.tiles.heads import per_batch_row, per_query_head
from headwater.kernels.tiles.mask import Mask

MOST_CLASSES = 16
FEW = 16  # neighbouring keys that are cheaper to treat one by one than in another walk


@dataclass(frozen=True, eq=False)
class KeyClasses:
    """`of_key` int32 [batch|1, key]; `inside[e, name][c]`: is class c in the set `name` of edit e."""

    of_key: Tensor
    count: int
    inside: dict[tuple[int, str], list[bool]]

    def groups(self) -> Tensor:
        """The classes as groups of keys, bool [batch|1, class, key]."""
        return self.of_key[:, None] == torch.arange(self.count, device=self.of_key.device)[:, None]

    def most(self) -> int:
        """The class of most keys."""
        return int(self.of_key.flatten().bincount(minlength=self.count).argmax())

    def few(self) -> tuple[int, int] | None:
        """The columns `first:last` that hold all other classes; None where they are more than `FEW`."""
        other = (self.of_key != self.most()).any(0).nonzero()[:, 0]
        if not len(other):
            return 0, 1
        first, last = int(other[0]), int(other[-1]) + 1
        return (first, last) if last - first <= FEW else None


@dataclass(frozen=True, eq=False)
class Mixed:
    """One pattern that was mixed in, and its `factor` per class and query, [batch, head, class, query].

    `on`: the pattern's own mass on each class, of the same shape; None where the factors were saved.
    """

    pattern: Pattern
    factor: Tensor
    on: Tensor | None


@dataclass(frozen=True, eq=False)
class Folded:
    """All edits of a map as `factor` [batch, head, class, query], `kept` [batch, head, query] and patterns."""

    classes: KeyClasses
    factor: Tensor
    kept: Tensor
    mixed: tuple[Mixed, ...] = ()

    def gather(self, rule: ScoreRule, x: Tensor) -> Tensor | float:
        """What the patterns add to `P @ x`, x [batch, kv head|head|1, key, c]: [batch, head, query, c], or 0.0."""
        found: Tensor | float = 0.0
        heads, kinds = self.kept.shape[1], self.classes.groups().to(x)
        for part in self.mixed:
            values = x if self.classes.count == 1 else torch.einsum("bhkx,bck->bhkcx", x, kinds).flatten(3)
            there = per_query_head(pattern_products.gather(part.pattern, rule.mask, heads, values), heads)
            there = there.unflatten(-1, (self.classes.count, -1))
            found = found + torch.einsum("bhqcx,bhcq->bhqx", there, part.factor.to(there))
        return found

    def scatter(self, rule: ScoreRule, y: Tensor) -> Tensor | float:
        """What the patterns add to `P^T @ y`, y [batch, head, query, c]: [batch, head, key, c], or 0.0."""
        found: Tensor | float = 0.0
        kinds = self.classes.groups().to(y)
        for part in self.mixed:
            sent = (part.factor.mT[..., None].to(y) * y[..., None, :]).flatten(-2)
            there = pattern_products.scatter(part.pattern, rule.mask, sent).unflatten(
                -1, (self.classes.count, -1)
            )
            found = found + torch.einsum("bhkcx,bck->bhkx", there, kinds)
        return found


def classify(edits: Sequence[WeightEdit], keys: int, device: torch.device) -> KeyClasses:
    """Number the combinations of sets that occur; class 0 where no edit names any key."""
    of_key = torch.zeros(1, keys, dtype=torch.long, device=device)
    inside: dict[tuple[int, str], list[bool]] = {}
    for place, members in _sets(edits).items():
        # one more bit for every set; unique keeps the numbers small and only those that occur
        values, of_key = (2 * of_key + members.to(device)).unique(return_inverse=True)
        # a class may have split in two: what was known of it holds for both
        before = (values // 2).tolist()
        inside = {old: [known[c] for c in before] for old, known in inside.items()}
        inside[place] = (values % 2 == 1).tolist()
    return KeyClasses(of_key.to(torch.int32), len(next(iter(inside.values()), [0])), inside)


def mixes(steps: Sequence[WeightStep]) -> bool:
    """Whether a pattern is part of these weights."""
    return any(isinstance(step.edit, MixPattern) for step in steps)


def why_not(edits: Sequence[WeightEdit], keys: int, device: torch.device) -> str | None:
    """Why these edits are no factors of key classes, or None where they are."""
    for edit in edits:
        if not isinstance(edit, Rescale | MixIdentity | MixPattern):
            return f"the weight edit {type(edit).__name__}"
    if edits and classify(edits, keys, device).count > MOST_CLASSES:
        return f"edits of more than {MOST_CLASSES} classes of keys"
    return None


def own_columns(mask: Mask, device: torch.device) -> Tensor:
    """The column of each query's own position, int64 [query]; some column where there is none."""
    return (torch.arange(mask.queries, device=device) + mask.shift).clamp(0, max(mask.keys - 1, 0))


def refold(state: MapState) -> Folded | None:
    """The edits of a finished forward pass, None where there are none; rows without weights keep nothing."""
    if not state.steps:
        return None
    edits = [step.edit for step in state.steps]
    classes = classify(edits, state.mask.keys, state.lse.device)
    factors = [step.factors for step in state.steps]
    return fold(edits, classes, state.rule, ~torch.isinf(state.lse), factors=factors)[0]


def _sets(edits: Sequence[WeightEdit]) -> dict[tuple[int, str], Tensor]:
    """The sets of keys that the edits name, each bool [batch|1, key]."""
    found = {}
    for e, edit in enumerate(edits):
        if isinstance(edit, Rescale):
            found |= {(e, "keys"): edit.keys, (e, "to"): edit.to}
            if edit.condition is not None:
                found |= {(e, "of"): edit.condition.of, (e, "within"): edit.condition.within}
    return found


def fold(
    edits: Sequence[WeightEdit],
    classes: KeyClasses,
    rule: ScoreRule,
    live: Tensor,
    mass: Tensor | None = None,
    factors: Sequence[tuple[Tensor, ...]] | None = None,
) -> tuple[Folded, tuple[WeightStep, ...]]:
    """The edits in their order, from the masses of the classes [batch, head, class, query] or from saved factors.

    `live` [batch, head, query] marks the rows that have weights: the others keep nothing and see no pattern. In float64
    where these are.
    """
    (batch, heads, queries), device = live.shape, live.device
    given = mass if mass is not None else next((f for row in factors or () for f in row), None)
    high = torch.float32 if given is None else tile_dtype(given)
    factor = torch.ones(batch, heads, classes.count, queries, device=device, dtype=high)
    kept = torch.zeros(batch, heads, queries, device=device, dtype=high)
    own = rule.mask.own_key().to(device)[:, None]
    own_class = classes.of_key[:, own_columns(rule.mask, device)].long()[:, None]

    # State before edit e: weight_ij = factor_i[class of j] * p_ij + kept_i * [j = i] + sum over mixed of their share.
    # Every edit multiplies all three terms alike; a mix then adds its own term.
    steps, mixed = [], []
    for e, edit in enumerate(edits):
        assert isinstance(edit, Rescale | MixIdentity | MixPattern)
        acts = per_batch_row(edit.heads).to(device)[..., None] & live
        acts = acts if edit.rows is None else acts & edit.rows.to(device)
        saved = None if factors is None else tuple(f.to(high) for f in factors[e])
        if isinstance(edit, MixIdentity):
            saved = ((acts & own).to(high) * edit.amount,) if saved is None else saved
            factor = factor * (1 - saved[0])[:, :, None]
            kept = kept * (1 - saved[0]) + saved[0]
            mixed = [replace(part, factor=part.factor * (1 - saved[0])[:, :, None]) for part in mixed]
        elif isinstance(edit, MixPattern):
            on = None
            if saved is None:
                there = classes.groups().to(high).mT[:, None].expand(batch, -1, -1, -1)
                on = pattern_products.gather(edit.pattern, rule.mask, heads, there).mT.expand(
                    batch, heads, -1, -1
                )
                total = on.sum(2)
                acts = acts & (total > 0)
                amount = acts.to(high) * edit.amount
                saved = amount, amount if edit.pattern.as_it_is else amount / torch.where(acts, total, 1.0)
            factor = factor * (1 - saved[0])[:, :, None]
            kept = kept * (1 - saved[0])
            mixed = [replace(part, factor=part.factor * (1 - saved[0])[:, :, None]) for part in mixed]
            mixed.append(Mixed(edit.pattern, (saved[1] * live)[:, :, None].expand_as(factor), on))
        else:
            inside = {n: torch.tensor(c, device=device) for (f, n), c in classes.inside.items() if f == e}
            if saved is None:
                assert mass is not None
                now = factor * mass
                for part in mixed:
                    assert part.on is not None
                    now = now + part.factor * part.on
                on = {
                    n: torch.where(c[:, None], now, 0.0).sum(2) + kept * c[own_class]
                    for n, c in inside.items()
                }
                saved = _settle(edit, on, acts)
            keep, gain = (x[:, :, None] for x in saved)
            change = torch.where(inside["keys"][:, None], keep, torch.where(inside["to"][:, None], gain, 1.0))
            factor = factor * change
            mixed = [replace(part, factor=part.factor * change) for part in mixed]
            kept = kept * change.gather(2, own_class[:, :, None].expand(batch, heads, 1, queries))[:, :, 0]
        steps.append(WeightStep(edit, saved))
    kept = kept.masked_fill(~live, 0.0)
    return Folded(classes, factor.contiguous(), kept.contiguous(), tuple(mixed)), tuple(steps)


def _settle(edit: Rescale, on: dict[str, Tensor], acts: Tensor) -> tuple[Tensor, Tensor]:
    """The factors on `keys` and on `to`, [batch, head, query], from the masses `on` the sets, as `Rescale.resolve` has
    them."""
    acts = acts & (on["to"] > NOTHING)
    if edit.condition is not None:
        share = on["of"] / (on["within"] + WITHIN_EPSILON)
        acts = acts & (share <= edit.condition.most) & (on["within"] >= edit.condition.least)
    gain = 1 + per_mass((1 - edit.keep) * on["keys"], torch.where(acts, on["to"], 1.0))
    return torch.where(acts, gain.new_tensor(edit.keep), 1.0), torch.where(acts, gain, 1.0)
