"""The output of an attention layer at each position as a sum of vectors, one for each token that it attends to.

For one layer the output of position i is `Σ_j y_ij + biases` with `y_ij = s_i·Σ_h A_ij f_h(x_j) + 1[i=j] x_i` and
`f_h(x) = v_h W_O^h`; `s_i` is the scale of a norm on the attention's output alone (Gemma 2), else 1. With an output
gate (Qwen3-Next) `f_h(x_j)` is `(g_i^h ⊙ v_h) W_O^h`, which depends on the query too. Where a norm follows the sum
(BERT), its linear part is applied to each term. Norms are identified by their inputs and outputs in a run, not by their
names. A model whose terms do not add up to its own output is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch, outputs_of
from headwater.analyses._streams.frozen_norm import Norm
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.attention.module_hooks import hidden_states, with_hidden_states
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks as anatomy
from headwater.lens.models.closeness import close_or_refuse, of_sums
from headwater.lens.models.weights import head_weights
from headwater.lens.running import output_gates
from headwater.lens.running.watching import Call, Heads, watching

FEW = 64  # up to this many asked rows are read one by one; more are read with all rows, in blocks


@dataclass(frozen=True, eq=False)
class Mixing:
    """The factors of one layer's terms `y_ij`, in float64, position axes of equal length.

    `value` [batch, head, key, d_head] per query head, `z` the heads' outputs of the same shape (times the output
    gate `gate`, if there is one), `output` W_O [head, d_head, d_model]. `entering` is x and `mixed` the sum with its
    biases, after the norm `first` if there is one, both [batch, position, d_model]. `second` is the norm at the end of
    the block, if there is one.
    """

    map: AttentionMap
    value: Tensor
    z: Tensor
    output: Tensor
    entering: Tensor
    mixed: Tensor
    scale: Tensor
    first: Norm | None
    second: Norm | None
    gate: Tensor | None = None

    def terms(self, norms: tuple[Norm, ...] = (), query: int = 0) -> Tensor:
        """`f_h(x_j)`, through the linear parts of `norms`: [batch, head, key, d_model]. With an output gate they are
        those of one query."""
        return self._through(
            self.value if self.gate is None else self.value * self.gate[:, :, query, None], norms
        )

    def vectors(
        self, blocks: Iterable[tuple[slice, Tensor]], norms: tuple[Norm, ...] = ()
    ) -> Iterator[tuple[slice, Tensor]]:
        """`Σ_h A_ij f_h(x_j)` of blocks of rows with their weights [batch, head, row, key]: spans of rows and their
        vectors [batch, key, row, d_model]. With an output gate the rows come one by one."""
        terms = None if self.gate is not None else self.terms(norms).permute(0, 2, 1, 3)
        for span, weights in blocks:
            if terms is not None:
                yield span, weights.double().permute(0, 3, 2, 1) @ terms
                continue
            for place, query in enumerate(range(span.start, span.stop)):
                each = torch.einsum("bhk,bhkm->bkm", weights[:, :, place].double(), self.terms(norms, query))
                yield slice(query, query + 1), each[:, :, None]

    def _through(self, z: Tensor, norms: tuple[Norm, ...]) -> Tensor:
        output = self.output
        for norm in norms:
            output = norm.linear(output)
        return torch.einsum("bhkd,hdm->bhkm", z, output)

    def own(self, norms: tuple[Norm, ...] = ()) -> Tensor:
        """The residual term `x_i`, through the linear parts of `norms`: [batch, position, d_model]."""
        x = self.entering
        for norm in norms:
            x = norm.linear(x)
        return x

    def total(self, residual: bool, norms: tuple[Norm, ...] = ()) -> Tensor:
        """`Σ_j y_ij`, [batch, position, d_model]."""
        return self._sum(self.z, residual, norms)

    def selves(self, residual: bool, norms: tuple[Norm, ...] = ()) -> Tensor:
        """`y_ii`, [batch, position, d_model]."""
        weights = self.map.statistic("self").double().nan_to_num().to(self.value.device)
        z = weights[..., None] * self.value
        return self._sum(z if self.gate is None else z * self.gate, residual, norms)

    def _sum(self, z: Tensor, residual: bool, norms: tuple[Norm, ...]) -> Tensor:
        found = self.scale[..., None] * self._through(z, norms).sum(1)
        return (found + self.own(norms) if residual else found) / self.divisor(norms)[..., None]

    def divisor(self, norms: tuple[Norm, ...]) -> Tensor:
        """The product of the norms' deviations at each position, [batch, position]."""
        return math.prod((norm.deviation for norm in norms), start=torch.ones_like(self.scale))


def rows_of(map: AttentionMap, wanted: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their weights [batch, head, row, key] in float64; all rows, or at least the wanted ones."""
    rows = None if wanted is None else wanted.unique().tolist()
    if rows is None or len(rows) > FEW:
        for span, weights in map.row_blocks():
            yield span, weights.double()
    else:
        for row in rows:
            span = slice(row, row + 1)
            yield span, map.tile(span, slice(0, map.shape[3])).double()


def norm_blocks(
    mixing: Mixing, residual: bool, norms: tuple[Norm, ...], wanted: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `‖y_ij‖`, [batch, row, key], from the products `f_h·f_g` of each key, without the vectors `y_ij`.

    `‖Σ_h A_h f_h‖² = Σ_hg A_h A_g f_h·f_g`: heads² numbers per key, not d_model for each pair. With an output gate the
    products differ from query to query, so the vectors of each row are made.
    """
    if mixing.gate is not None:
        yield from _gated_norms(mixing, residual, norms, wanted)
        return
    terms = mixing.terms(norms)
    products = torch.einsum("bhkm,bgkm->bkhg", terms, terms)
    own = mixing.own(norms) if residual else torch.zeros_like(terms[:, 0])
    crossed = torch.einsum("bhkm,bkm->bkh", terms, own)
    size = own.square().sum(-1)
    divisor = mixing.divisor(norms)
    for span, weights in rows_of(mixing.map, wanted):
        square = torch.einsum("bhqk,bkhg,bgqk->bqk", weights, products, weights)
        scale = mixing.scale[:, span, None]
        square = square * scale**2
        if residual:
            place = torch.arange(span.start, span.stop)
            here = weights[:, :, place - span.start, place]
            more = 2 * scale[..., 0] * torch.einsum("bhq,bqh->bq", here, crossed[:, span]) + size[:, span]
            square[:, place - span.start, place] += more
        yield span, square.clamp_min(0).sqrt() / divisor[:, span, None]


def _gated_norms(
    mixing: Mixing, residual: bool, norms: tuple[Norm, ...], wanted: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    own, divisor = mixing.own(norms), mixing.divisor(norms)
    for span, vectors in mixing.vectors(rows_of(mixing.map, wanted), norms):
        vectors = vectors[:, :, 0] * mixing.scale[:, span, None]
        if residual:
            vectors[:, span.start] += own[:, span.start]
        yield span, (vectors.norm(dim=-1) / divisor[:, span])[:, None]


# --- reading them from a run


def mixings(model: HookedModel, batch: Batch) -> dict[int, Mixing]:
    """Every layer's mixing on a batch of texts of equal length."""
    blocks = {layer: anatomy.block(model, layer) for layer in model.layers}
    norms = {
        m: n
        for n, b in blocks.items()
        for m in b.module.modules()
        if "norm" in type(m).__name__.lower() and all(w.dim() < 2 for w in m.parameters())
    }
    heads = Heads(model)
    watched = [module for block in blocks.values() for module in (block.module, block.attention)]
    inside = [module for layer in model.layers for module in output_gates.modules_of(model, layer)]
    with watching(dict.fromkeys([*watched, *norms, *inside])) as calls, context.listening(heads):
        outputs_of(model)(batch.ids)
    calls = [_with_rows(call) for call in calls]
    found = {}
    for layer, block in blocks.items():
        _refuse_output_edits(model, layer, heads.layers[layer][0])
        whole = next(call for call in calls if call.module is block.module)
        attention = next(call for call in calls if call.module is block.attention)
        inside = [call for call in calls if norms.get(call.module) == layer]
        gate = output_gates.output_gate(model, layer, calls, heads.layers[layer][2])
        found[layer] = _mixing(model, layer, heads.layers[layer], gate, whole, attention, inside)
    return found


def _with_rows(call: Call) -> Call:
    """A call with an axis of rows in front of its states; packed patches [patch, feature] have none."""
    if call.output.dim() != 2:
        return call
    args, kwargs = with_hidden_states(call.args, call.kwargs, hidden_states(call.args, call.kwargs)[None])
    return replace(call, args=args, kwargs=kwargs, output=call.output[None])


def _mixing(
    model: HookedModel, layer: int, heads: tuple[AttentionMap, Tensor, Tensor], gate: Tensor | None, whole: Call,
    attention: Call, norms: list[Call],
) -> Mixing:  # fmt: skip
    map, value, z = heads[0], heads[1].double(), heads[2].detach().double()
    gate = None if gate is None else gate.double()
    z = z if gate is None else z * gate
    weights = head_weights(model, layer)
    output, bias = weights.W_O.double().to(z.device), weights.b_O.double().to(z.device)
    written = torch.einsum("bhqd,hdm->bqm", z, output) + bias
    scale, first, second = torch.ones_like(written[..., 0]), None, None
    x = whole.given.double()
    last = next((norm for norm in norms if _same(norm.output, whole.output)), None)
    behind = next((norm for norm in norms if _same(norm.given, attention.output)), None)
    if model.parts[model.part_name].crosses:
        x, first, mixed, attended = _beside_crossing(attention, norms)
    elif last is not None:  # a block that ends in a norm has one behind its attention too
        first, second = Norm.of(norms[0].module, norms[0].given), Norm.of(last.module, last.given)
        attended, mixed = norms[0].given.double() - x, norms[0].output
    elif behind is not None:
        norm = Norm.of(behind.module, behind.given)
        scale, output = 1 / norm.deviation, norm.linear(output)
        attended, mixed = behind.given, x + behind.output
    else:
        attended, mixed = attention.output, x + attention.output
    close_or_refuse(
        written, attended.double(),
        f"the heads of {model.name} do not add up to the attention's output in layer {layer}",
        "; blocks of this architecture can not be taken apart",
        allowed=of_sums(model, 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2),
    )  # fmt: skip
    value = value.repeat_interleave(map.shape[1] // value.shape[1], 1)
    return Mixing(map, value, z, output, x, mixed.double(), scale, first, second, gate)


def _beside_crossing(
    attention: Call, norms: list[Call]
) -> tuple[Tensor, Norm | None, Tensor, Tensor]:  # fmt: skip
    """The stream to which cross-attention is added, the norm behind the sum if there is one, the sum after it, and what
    the attention adds."""
    given, output = attention.given, attention.output
    whole = given + output
    behind = next((norm for norm in norms if _alike(norm.given, whole)), None)
    if behind is None:  # BERT's attention modules add the stream and hold the norm
        behind = next((norm for norm in norms if _same(norm.output, output)), None)
        output = output if behind is None else behind.given - given
    if behind is not None:
        return given.double(), Norm.of(behind.module, behind.given), behind.output, output
    x = next((norm.given for norm in norms if _same(norm.output, given)), given).double()
    return x, None, x + output, output


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same sum but for rounding."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _refuse_output_edits(model: HookedModel, layer: int, map: AttentionMap) -> None:
    for prepared in context.active(model.key):
        if prepared.lower(layer, map.rule.mask, map.shape[0]).outputs:
            raise AnalysisError(
                f"heads of layer {layer} are scaled or replaced by an edit, so their outputs are no sums over tokens; "
                "take that edit off"
            )
