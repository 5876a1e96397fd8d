"""Edits of attention and of heads, as a user writes them: small frozen dataclasses, data and never callbacks.

An edit acts at one of three places, in this order whatever order the edits are given in: scores (`Temperature`,
`Knockout`), weights (`Redistribute`, `TowardIdentity`), a head's output before the output projection (`ScaleHeads`,
`AblateHeads`); edits of the same place act in the order given. The meaning of each is `kernels/reference.py`. Every
edit at its neutral value leaves the run as it is, bit for bit.

`heads` is "all", "5.1" or a list of such; `layers` limits "all". Positions count the real tokens of each row
(positions.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headwater.kernels import edits as kernel
from headwater.kernels.mask import Mask
from headwater.lens import positions
from headwater.lens.errors import EditError, nearest
from headwater.lens.heads import Head, Heads, Layers, chosen
from headwater.lens.hooks import Lowered
from headwater.lens.positions import Positions

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel


@dataclass(frozen=True)
class Edit:
    """Base of all edits. A new edit is a subclass that says how it lowers in one layer."""

    def prepare(self, model: HookedModel) -> Prepared:
        """Check the edit against a model and fetch what it needs from it."""
        raise TypeError(f"{type(self).__name__} is not an edit that can be applied")

    def named_positions(self) -> list[Positions]:
        """The positions the edit names, so that a prompt too short for them is refused."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `edit_from_dict` reads it back."""
        return {"edit": type(self).__name__} | {
            f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)
        }

    def to_python(self) -> str:
        """The edit as a line of Python, with `hw` for `headwater`; settings at their default are left out."""
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or not _same(value, field.default):
                shown.append(f"{field.name}={_source(value)}")
        return f"hw.{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, eq=False)
class Prepared:
    """An edit made ready for one model: its head masks by layer, and what it lowers to there."""

    edit: Edit
    heads: Mapping[int, Tensor]
    values: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    def lower(self, layer: int, mask: Mask) -> Lowered:
        if layer not in self.heads:
            return Lowered()
        return self.edit._lower(self.heads[layer], mask, self.values.get(layer))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _HeadWise(Edit):
    """What the edits that take `heads` and `layers` share; at its neutral value an edit touches nothing."""

    def prepare(self, model: HookedModel) -> Prepared:
        self._check()
        heads = chosen(self.heads, self.layers, model.layers, model.n_heads)  # type: ignore[attr-defined]
        return Prepared(self, {} if self._is_neutral() else heads)

    def _check(self) -> None: ...

    def _is_neutral(self) -> bool:
        return False


@dataclass(frozen=True)
class Temperature(_HeadWise):
    """Scores times `tau` before the softmax: above 1 sharpens, below 1 flattens, 0 makes the row uniform.

    `tau` is the factor itself (an inverse temperature), not a divisor. A learned sink's logit is not touched.
    """

    tau: float
    heads: Heads = "all"
    layers: Layers = "all"

    def _check(self) -> None:
        _number(self.tau, "tau", "Temperature")

    def _is_neutral(self) -> bool:
        return self.tau == 1

    def _lower(self, heads: Tensor, mask: Mask, values: Tensor | None) -> Lowered:
        return Lowered(scores=(kernel.ScaleScores(heads, float(self.tau)),))


@dataclass(frozen=True)
class Knockout(_HeadWise):
    """`queries` may not look at `keys`: scores to -inf, the rest of the row renormalised.

    A row left with nothing gives zero output.
    """

    queries: Positions
    keys: Positions
    heads: Heads = "all"
    layers: Layers = "all"

    def named_positions(self) -> list[Positions]:
        return [self.queries, self.keys]

    def _check(self) -> None:
        positions.check(self.queries, "Knockout: queries")
        positions.check(self.keys, "Knockout: keys")

    def _is_neutral(self) -> bool:
        return self._empty(self.queries) or self._empty(self.keys)

    @staticmethod
    def _empty(given: Positions) -> bool:
        return positions.check(given, "Knockout: positions") == ()

    def _lower(self, heads: Tensor, mask: Mask, values: Tensor | None) -> Lowered:
        queries = positions.select(positions.check(self.queries, "queries"), mask, "query")
        keys = positions.select(positions.check(self.keys, "keys"), mask, "key")
        return Lowered(scores=(kernel.BlockScores(heads, queries, keys),))


@dataclass(frozen=True)
class Redistribute(_HeadWise):
    """Weights on `keys` times `keep`; the freed mass goes to `to` in proportion to the weights already there.

    `to` is "others" (every other key) or positions. A row that sees nothing of `to` is left as it was, so rows keep
    their sum. `keep` is between 0 and 1; 1 changes nothing.
    """

    keys: Positions
    keep: float = 0.4
    to: Positions = "others"
    heads: Heads = "all"
    layers: Layers = "all"

    def named_positions(self) -> list[Positions]:
        return [self.keys] if isinstance(self.to, str) else [self.keys, self.to]

    def _check(self) -> None:
        keys = positions.check(self.keys, "Redistribute: keys")
        if not 0 <= _number(self.keep, "keep", "Redistribute") <= 1:
            raise EditError(
                f"Redistribute: keep must be between 0 and 1, or weights would turn negative; got {self.keep}"
            )
        if not (isinstance(self.to, str) and self.to == "others"):
            if isinstance(self.to, str):
                raise EditError(f"Redistribute: to must be 'others' or positions; got {self.to!r}")
            shared = _overlap(keys, positions.check(self.to, "Redistribute: to"))
            if shared:
                raise EditError(
                    f"Redistribute: positions {shared} are both in keys and in to; take them out of one"
                )

    def _is_neutral(self) -> bool:
        return self.keep == 1 or positions.check(self.keys, "Redistribute: keys") == ()

    def _lower(self, heads: Tensor, mask: Mask, values: Tensor | None) -> Lowered:
        keys = positions.select(positions.check(self.keys, "keys"), mask, "key")
        if isinstance(self.to, str):
            to = ~keys
        else:
            to = positions.select(positions.check(self.to, "to"), mask, "key") & ~keys
        return Lowered(weights=(kernel.Rescale(heads, keys, to, float(self.keep)),))


@dataclass(frozen=True)
class TowardIdentity(_HeadWise):
    """P → (1-amount)·P + amount·I: mix every query's attention with attention to itself (SoftPAG, Ahn et al. 2025)."""

    amount: float
    heads: Heads = "all"
    layers: Layers = "all"

    def _check(self) -> None:
        if not 0 <= _number(self.amount, "amount", "TowardIdentity") <= 1:
            raise EditError(f"TowardIdentity: amount must be between 0 and 1; got {self.amount}")

    def _is_neutral(self) -> bool:
        return self.amount == 0

    def _lower(self, heads: Tensor, mask: Mask, values: Tensor | None) -> Lowered:
        return Lowered(weights=(kernel.MixIdentity(heads, float(self.amount)),))


@dataclass(frozen=True)
class ScaleHeads(Edit):
    """z → factor·z per head, before the output projection; `{"2.3": 0.0}` switches head 2.3 off."""

    factors: Mapping[str | Head, float]

    def prepare(self, model: HookedModel) -> Prepared:
        if not isinstance(self.factors, Mapping):
            raise EditError(f"ScaleHeads takes a mapping such as {{'2.3': 0.0}}; got {self.factors!r}")
        for factor in self.factors.values():
            _number(factor, "a factor", "ScaleHeads")
        changed = {head: float(f) for head, f in self.factors.items() if f != 1}
        chosen(list(self.factors), "all", model.layers, model.n_heads)  # names every head that does not exist
        masks = chosen(list(changed), "all", model.layers, model.n_heads) if changed else {}
        gates = {layer: torch.ones(1, model.n_heads) for layer in masks}
        for head, factor in changed.items():
            layer, index = Head.parse(head)
            gates[layer][0, index] *= factor
        return Prepared(self, masks, gates)

    def _lower(self, heads: Tensor, mask: Mask, values: Tensor | None) -> Lowered:
        assert values is not None
        return Lowered(outputs=(kernel.Gate(values),))


@dataclass(frozen=True)
class AblateHeads(_HeadWise):
    """Replace the heads' outputs z: `how` is "zero", "mean" or "resample".

    "mean" takes each head's mean of z over the real positions and the batch of `examples` (texts or token ids).
    "resample" takes z at the same position of an example, drawn per batch row with `seed`. Both run the unedited model.
    """

    heads: Heads
    how: Literal["zero", "mean", "resample"] = "zero"
    examples: Any = None
    seed: int = 0
    layers: Layers = "all"

    def _check(self) -> None:
        if self.how not in ("zero", "mean", "resample"):
            raise EditError(f"AblateHeads: how must be 'zero', 'mean' or 'resample'; got {self.how!r}")
        if self.how != "zero" and self.examples is None:
            raise EditError(
                f"AblateHeads(how={self.how!r}) needs examples=, texts or token ids to take the outputs from"
            )

    def prepare(self, model: HookedModel) -> Prepared:
        prepared = super().prepare(model)
        if self.how == "zero" or not prepared.heads:
            return prepared
        tokens = model.to_tokens(self.examples)
        outputs = model.head_outputs(tokens, edited=False)  # [example, layer, head, position, d_head]
        values = {}
        for layer in prepared.heads:
            z = outputs[:, model.layers.index(layer)]
            if self.how == "mean":
                real = tokens.mask[:, None, :, None].to(z)
                values[layer] = ((z * real).sum((0, 2)) / real.sum((0, 2)))[None, :, None]
            else:
                values[layer] = z.masked_fill(~tokens.mask[:, None, :, None].to(z.device), torch.nan)
        return Prepared(self, prepared.heads, values)

    def _lower(self, heads: Tensor, mask: Mask, values: Tensor | None) -> Lowered:
        if self.how == "zero":
            return Lowered(outputs=(kernel.Gate((~heads).float()[None]),))
        assert values is not None
        if self.how == "resample":
            values = self._drawn(values, mask)
        return Lowered(outputs=(kernel.ReplaceOutput(heads, values),))

    def _drawn(self, values: Tensor, mask: Mask) -> Tensor:
        last = mask.query_offset + mask.queries
        longest = last if mask.start is None or mask.stop is None else int((mask.stop - mask.start).max())
        lengths = values[:, 0, :, 0].isfinite().sum(-1)
        enough = (lengths >= longest).nonzero()[:, 0]
        if not len(enough):
            raise EditError(
                f"AblateHeads(how='resample'): position {longest - 1} is needed but the longest example has "
                f"{int(lengths.max())} tokens; give longer examples"
            )
        generator = torch.Generator().manual_seed(self.seed)
        return values[enough[torch.randperm(len(enough), generator=generator)]].nan_to_num(0.0)


EDITS: dict[str, type[Edit]] = {
    c.__name__: c for c in (ScaleHeads, AblateHeads, Knockout, Redistribute, TowardIdentity, Temperature)
}


def edit_from_dict(data: Mapping[str, Any]) -> Edit:
    """Read back what `Edit.to_dict` gave; every unknown name is an EditError that offers the nearest."""
    if not isinstance(data, Mapping) or not isinstance(data.get("edit"), str):
        raise EditError(
            f"an edit is an object with the field 'edit', one of {', '.join(EDITS)}; got {data!r}"
        )
    name = data["edit"]
    if name not in EDITS:
        raise EditError(f"unknown edit {name!r}: {nearest(name, EDITS)}")
    kind = EDITS[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [key for key in data if key != "edit" and key not in fields]
    if unknown:
        raise EditError(f"{name} has no setting {unknown[0]!r}: {nearest(str(unknown[0]), fields)}")
    missing = [n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING]
    if missing:
        raise EditError(f"{name} needs {', '.join(missing)}")
    return kind(**{key: _read(value) for key, value in data.items() if key != "edit"})


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EditError(f"{where}: {what} must be a finite number; got {value!r}")
    return float(value)


def _overlap(a: Positions, b: Positions) -> list[int]:
    """Positions written the same way in both; an overlap that a prompt's length alone shows is taken out later."""
    if isinstance(a, str) or isinstance(b, str):
        return []
    first, second = ([p] if isinstance(p, int) else list(p) if isinstance(p, tuple) else [] for p in (a, b))
    return sorted(set(first) & set(second))


def _plain(value: Any) -> Any:
    if isinstance(value, Head):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Sequence | range) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value


def _read(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"slice"}:
        return slice(*value["slice"])
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else value


def _source(value: Any) -> str:
    if isinstance(value, Tensor):
        return repr(value.tolist())
    return repr(_plain(value)) if not isinstance(value, slice) else repr(value)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b
