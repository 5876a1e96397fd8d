"""Edits of the weights after the softmax, in the given order; every row keeps its sum, but under `ScaleWeights`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from headwater.kernels.edits import weights as kernel
from headwater.kernels.rules import normaliser as normaliser_kernel
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import ANY, SHARE, Edit, HeadWise, LayerCall, Prepared, Rows, number, overlap
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.errors import EditError
from headwater.lens.models.opened import Opened
from headwater.lens.naming import positions
from headwater.lens.naming.heads import Heads, Layers, chosen
from headwater.lens.naming.positions import Positions

__all__ = ["MoveAttention", "Normaliser", "Redistribute", "ScaleWeights", "TowardIdentity"]

WHERE = ("of", "within", "most", "least")


@dataclass(frozen=True, eq=False)
class Redistribute(HeadWise, neutral={"keep": 1}):
    """Multiply the weights on `keys` by `keep`; the freed weight goes to `to`, in proportion to the weights there.

    `to` is "others" (every other key) or positions. A row with no weight on `to` is not changed. `keep` is between 0
    and 1; 1 changes nothing. `queries` limits the rows. So does `where`, a mapping with `of`, `within` (positions),
    `most` and `least`: only rows with mass(of) / (mass(within) + 1e-6) ≤ most and mass(within) ≥ least are changed.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Redistribute("token:John", keep=0.25, to=0, heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)  # 1.00 at 3 without
    tensor([0.7500, 0.0000, 0.0000, 0.2500, 0.0000, 0.0000])
    """

    keys: Positions
    keep: float = 0.4
    to: Positions = "others"
    heads: Heads = "all"
    layers: Layers = "all"
    queries: Positions = "all"
    where: Mapping[str, Any] | None = None
    rows: Rows = "all"

    def named_positions(self) -> list[Positions]:
        found = [self.keys, self.queries]
        found += [] if self._to_others else [self.to]
        return found + ([] if self.where is None else [self.where["of"], self.where["within"]])

    @property
    def _to_others(self) -> bool:
        return isinstance(self.to, str) and self.to == "others"

    def _check(self) -> None:
        super()._check()
        if not 0 <= number(self.keep, "keep", "Redistribute") <= 1:
            raise EditError(
                f"Redistribute: keep must be between 0 and 1, or weights would turn negative; got {self.keep}"
            )
        if not self._to_others:
            _check_target(self.keys, self.to, "Redistribute")
        if self.where is not None:
            if not isinstance(self.where, Mapping) or set(self.where) != set(WHERE):
                raise EditError(
                    f"Redistribute: where is a mapping with {', '.join(WHERE)}; got {self.where!r}"
                )
            for name in ("of", "within"):
                positions.check(self.where[name], f"Redistribute: where: {name}")
            for name in ("most", "least"):
                number(self.where[name], name, "Redistribute: where")

    def _lower(self, call: LayerCall) -> Lowered:
        keys = call.keys(self.keys)
        to = ~keys if self._to_others else call.keys(self.to) & ~keys
        condition = None
        if self.where is not None:
            of, within = (call.keys(self.where[name]) for name in ("of", "within"))
            most, least = (float(self.where[name]) for name in ("most", "least"))
            condition = kernel.RowCondition(of, within, most, least)
        rows = call.rows(self.queries)
        return Lowered(weights=(kernel.Rescale(call.heads, keys, to, float(self.keep), rows, condition),))


@dataclass(frozen=True, eq=False)
class MoveAttention(HeadWise, numbers={"amount": SHARE}, neutral={"amount": 0}):
    """Move the share `amount` of the weight on keys `source` to keys `to`, in proportion to the weights there.

    A row with no weight on `to` is not changed; `amount` 0 changes nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.MoveAttention("token:John", "token:Mary", 0.75, heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)  # 1.00 at 3 without
    tensor([0.0000, 0.7500, 0.0000, 0.2500, 0.0000, 0.0000])
    """

    source: Positions
    to: Positions
    amount: float = 1.0
    heads: Heads = "all"
    layers: Layers = "all"
    queries: Positions = "all"
    rows: Rows = "all"

    def named_positions(self) -> list[Positions]:
        return [p for p in (self.source, self.to, self.queries) if not (isinstance(p, str) and p == "others")]

    def _check(self) -> None:
        super()._check()
        if self.source == "others" and self.to == "others":
            raise EditError("MoveAttention: source and to can not both be 'others'; name one of them")
        if "others" not in (self.source, self.to):
            _check_target(self.source, self.to, "MoveAttention")

    def _is_neutral(self) -> bool:
        return super()._is_neutral() or () in (positions.check(p, "to") for p in self.named_positions())

    def _lower(self, call: LayerCall) -> Lowered:
        if isinstance(self.source, str) and self.source == "others":
            to = call.keys(self.to)
            source = ~to
        else:
            source = call.keys(self.source)
            others = isinstance(self.to, str) and self.to == "others"
            to = ~source if others else call.keys(self.to) & ~source
        keep = 1 - float(self.amount)
        return Lowered(weights=(kernel.Rescale(call.heads, source, to, keep, call.rows(self.queries)),))


@dataclass(frozen=True, eq=False)
class ScaleWeights(HeadWise, numbers={"factor": ANY}, neutral={"factor": 1}):
    """Multiply the weights on `keys` by `factor`, in the rows `queries`, and renormalise nothing; 1 changes nothing.

    A row that has the mass m on `keys` sums to 1 + (factor - 1)·m afterwards, and every statistic is of these weights
    as they are: `row_mass` says what a row sums to, `entropy` is -Σ w ln w of weights that are no distribution, and is
    refused where a negative factor makes weights negative. `Redistribute` keeps the sum of a row, `BiasKeys` multiplies
    weights relative to others.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.ScaleWeights("token:John", 3.0, heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)  # 1.00 at 3 without
    tensor([0., 0., 0., 3., 0., 0.])
    """

    row_sums: ClassVar[str] = "the weights of a row do not sum to 1 under ScaleWeights"

    keys: Positions
    factor: float
    heads: Heads = "all"
    layers: Layers = "all"
    queries: Positions = "all"
    rows: Rows = "all"

    def _lower(self, call: LayerCall) -> Lowered:
        keys, rows = call.keys(self.keys), call.rows(self.queries)
        return Lowered(weights=(kernel.ScaleKeys(call.heads, keys, float(self.factor), rows),))


@dataclass(frozen=True, eq=False)
class Toward(HeadWise, numbers={"amount": SHARE}, neutral={"amount": 0}):
    """Base of the edits that mix a fixed pattern into the weights of the chosen queries; `amount` 0 changes nothing."""

    amount: float
    heads: Heads = "all"
    layers: Layers = "all"
    queries: Positions = "all"
    rows: Rows = "all"


@dataclass(frozen=True, eq=False)
class TowardIdentity(Toward):
    """P → (1-amount)·P + amount·I: mix in attention to the query's own position (SoftPAG, Ahn et al. 2025).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.TowardIdentity(0.5, heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0.0000, 0.0000, 0.0000, 0.5000, 0.0000, 0.5000])
    """

    own_position: ClassVar[bool] = True

    def _lower(self, call: LayerCall) -> Lowered:
        mix = kernel.MixIdentity(call.heads, float(self.amount), call.rows(self.queries))
        return Lowered(weights=(mix,))


@dataclass(frozen=True, eq=False)
class Normaliser(Edit):
    """Replace the softmax of whole layers by another normaliser: "softmax1", "sigmoid", "sinkhorn" …

    kernels/rules/normaliser.py lists them with their formulas. `bias` is for the sigmoids, `iterations` for sinkhorn,
    `features` for linear, `normalise` for elu1 and linear; "softmax" changes nothing. Of several such edits the last
    one wins.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Temperature(0.0), hw.Normaliser("softmax1")):  # scores 0, weights 1 / (1 + 6)
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0.1400, 0.1400, 0.1400, 0.1400, 0.1400, 0.1400])
    """

    name: str
    bias: float | None = None
    iterations: int | None = None
    features: str | None = None
    normalise: bool | None = None
    layers: Layers = "all"

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        try:
            made = normaliser_kernel.Normaliser(
                self.name, self.bias, self.iterations, self.features, self.normalise
            )
        except (ValueError, TypeError) as error:
            raise EditError(f"Normaliser: {error}") from None
        if self.name == "sinkhorn" and model.causal and not model.parts[model.part_name].crosses:
            raise EditError(
                "Normaliser: sinkhorn is for bidirectional attention, whose rows and columns both sum to a constant; "
                f"{model.name} is causal"
            )
        heads = chosen("all", self.layers, model.layers, model.n_heads)
        return Prepared(self, heads, Names(model, groups), dict.fromkeys(heads, made))

    def _lower(self, call: LayerCall) -> Lowered:
        return Lowered(normaliser=call.values)


def _check_target(keys: Any, to: Positions, where: str) -> None:
    if isinstance(to, str) and to == "all":
        raise EditError(f"{where}: to must be 'others' or positions; got {to!r}")
    shared = overlap(positions.check(keys, f"{where}: source"), positions.check(to, f"{where}: to"))
    if shared:
        raise EditError(f"{where}: positions {shared} are both in keys and in to; take them out of one")
