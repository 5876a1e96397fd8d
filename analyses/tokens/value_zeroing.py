"""Value zeroing: how much a position's next state changes when one token's values are set to zero in a layer.

Mohebbi et al. 2023 (arXiv 2301.12971). Each block runs again on its own input, once per token, without that token's
part of the heads' outputs. So the whole block takes part, with MLP and norms. The map of a layer is S×S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.examples import Batch, Examples, outputs_of
from headwater.analyses._prompts.positions import Positions
from headwater.analyses._prompts.texts import Texts, indicators
from headwater.analyses._streams.between_layers import refuse_crossing, refuse_mixers
from headwater.analyses.tokens._sinks_aside import one_token_of_product
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.attention.context import ActiveEdit, Lowered
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.blocks import refuse_several_streams
from headwater.lens.progress import progress
from headwater.lens.running.watching import Call, Heads, watching

LONGEST = 1024  # tokens; attention alone takes S³ operations per layer and unit of width
ELEMENTS = 2**23  # numbers in the heads' outputs of the copies that run together


@analysis
def value_zeroing(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[Positions, 'positions to explain, e.g. -1; "all" for every one'] = (-1,),
    first_layer: Annotated[int | None, "lowest layer of the product; none: the first", Bounds(0)] = None,
    last_layer: Annotated[int | None, "last layer of the product; none: the last", Bounds(0)] = None,
) -> xr.DataArray:
    """Rows of `V_L ··· V_1`, `V_l[i, t] = rownorm(1 - cos(x_i, x̃_i))`, as [batch, query, key].

    `x_i` is the output of block l, `x̃_i` its output on the same input with the values of token t at zero in every
    head. The diagonal is included, and no identity is mixed in, since the block holds the residual stream. A row where
    nothing changes keeps its own position. `first_layer = last_layer` gives the map of one layer; a decoder with
    cross-attention and cross-attention itself (`model.part("cross")`: V of the encoder's tokens) take one layer alone.

    Question: From which input tokens does a position draw, by what changes without their values?
    Unit: share of the position, each row sums to 1.
    Source: Mohebbi et al. 2023, arXiv:2301.12971; held to the authors' code.
    Cost: as many passes as a text has tokens, for all layers together; time O(layers·S³), memory O(S²).
    Not for: long texts (refused above 1,024 tokens); the direction of a change, as only the angle counts.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.value_zeroing(model, prompt, first_layer=2)
    >>> found.shape, float(found.sum().round(1)), found.attrs["layers"]
    ((1, 1, 15), 1.0, '[2, 3]')
    """
    for name, layer in (("first_layer", first_layer), ("last_layer", last_layer)):
        if layer is not None and layer not in model.layers:
            raise AnalysisError(f"{name}={layer} has no attention; the model has layers {model.layers}")
    low = model.layers[0] if first_layer is None else first_layer
    high = model.layers[-1] if last_layer is None else last_layer
    layers = [layer for layer in model.layers if low <= layer <= high]
    if not layers:
        raise AnalysisError(f"first_layer={low} is above last_layer={high}")
    refuse_several_streams(model)
    refuse_mixers(model.name, model.mixers, "value_zeroing", first_layer, last_layer)
    if len(layers) > 1:
        refuse_crossing(model, "value_zeroing of several layers")
    texts = Texts.of(model, examples, 1, LONGEST)
    columns = texts.columns(queries)
    found = texts.empty(columns.shape[1])
    for batch in progress(texts.batches, desc="value zeroing", unit="text"):
        rows = indicators(*texts.rows(batch, columns), texts.length(batch))
        calls, heads = _block_calls(model, batch, layers)
        for layer in reversed(layers):
            rows = rows @ _changes(model, layer, calls[layer], *heads.layers[layer][:2])
        texts.spread(batch, rows, found)
    product = texts.by_query(found, queries, columns, "value_zeroing").assign_attrs(layers=layers)
    if model.parts[model.part_name].crosses:
        return product
    return one_token_of_product(product, texts, model.causal)


@dataclass(frozen=True, eq=False)
class _Without(ActiveEdit):
    """An edit of one layer for copies of a text: token t's part of the heads' outputs is taken off copy t."""

    layer: int
    taken: Tensor  # [copy, head, query, d_head]

    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        return Lowered(outputs=(self,)) if layer == self.layer else Lowered()  # type: ignore[arg-type]

    def apply(self, z: Tensor, positions: Tensor) -> Tensor:
        return z - self.taken.to(z)


def _block_calls(model: HookedModel, batch: Batch, layers: list[int]) -> tuple[dict[int, Call], Heads]:
    """The call of each layer's block on one text, checked to be repeatable, and what its heads did."""
    blocks = {
        block.layer: model.hf.get_submodule(block.path) for block in model.stack if block.layer in layers
    }
    if len(blocks) < len(layers):
        raise AnalysisError(
            f"the blocks of {model.name} are not known, so none can run by itself; value_zeroing needs a model of "
            "transformers"
        )
    heads = Heads(model)
    with watching(blocks.values()) as calls, context.listening(heads):
        outputs_of(model)(batch.ids)
    found = {layer: next(c for c in calls if c.module is block) for layer, block in blocks.items()}
    with torch.no_grad():
        # from above too: a block may take keys that one below left behind in its own last run
        for layer, call, copies in [(*each, 2) for each in found.items()] + [
            (*e, 3) for e in [*found.items()][::-1]
        ]:
            if not _repeats(call, copies):
                raise AnalysisError(
                    f"the block of layer {layer} of {model.name} gives another output when it runs by itself"
                )
    return found, heads


def _repeats(call: Call, copies: int) -> bool:
    """Whether copies of what a block was given come out as before. Blocks may share more than that, such as keys."""
    try:
        again = call.again(_copies(call, copies))
    except Exception:  # transformers has no error of its own for blocks that can not run by themselves
        return False
    return torch.allclose(again, call.output.expand_as(again), rtol=1e-3, atol=1e-4)


def _copies(call: Call, count: int) -> Tensor:
    """What a block was given, `count` times. Packed patches [patch, feature] have no axis of rows and run one by
    one."""
    return call.given.expand(count, -1, -1) if call.given.dim() > 2 else call.given


def _changes(model: HookedModel, layer: int, call: Call, map: AttentionMap, value: Tensor) -> Tensor:
    """V of one layer, [query, token]; `value` is [1, kv head, token, d_head]."""
    _, heads, queries, length = map.shape
    value = value.repeat_interleave(heads // value.shape[1], 1)[0]
    edits = context.active(model.key)
    changes = torch.zeros(queries, length, dtype=torch.float64)
    step = max(ELEMENTS // (heads * queries * value.shape[-1]), 1) if call.given.dim() > 2 else 1
    for start in range(0, length, step):
        span = slice(start, min(start + step, length))
        weights = map.tile(slice(0, queries), span)[0]
        taken = torch.einsum("hqt,htd->thqd", weights, value[:, span].to(weights))
        # runs before the active edits, so that a scaled head loses the scaled part
        with (
            torch.no_grad(),
            context.unedited(model.key),
            model.acting([_Without(layer, taken), *edits]),
        ):
            without = call.again(_copies(call, len(taken))).double().view(len(taken), queries, -1)
        alike = torch.cosine_similarity(call.output.double().expand_as(without), without, dim=-1)
        changes[:, span] = (1 - alike).mT.cpu().masked_fill(~(weights != 0).any(0).cpu(), 0.0)
    # the cosine of two roundings of one vector differs from 1 by about this much
    changes[changes < (2 * torch.finfo(model.dtype).eps) ** 2] = 0
    total = changes.sum(-1, keepdim=True)
    if model.parts[model.part_name].crosses:
        return changes / total  # no key is the query's own; a row without a change is undefined
    return torch.where(total > 0, changes / total, torch.eye(length, dtype=torch.float64))
