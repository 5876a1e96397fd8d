"""How much each token contributes to a position by the length of the vector it sends, not by the attention weight
alone.

Kobayashi et al. 2020 (arXiv 2004.10102) for the attention, 2021 (arXiv 2109.07152) with residual stream and norm. The
lengths follow from products of the heads' terms at each key, so no vector is made per pair of tokens: for chosen rows
memory is linear in the length. MLPs are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.positions import Positions, position_coordinates
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.attention_terms import Mixing, mixings, norm_blocks, rows_of
from headwater.analyses._streams.frozen_norm import Norm
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

Stage = Literal["attention", "residual", "norm"]


@analysis
def norms(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[Positions, 'positions to look into, e.g. -1; "all" for every one'] = (-1,),
    stage: Annotated[
        Stage | None,
        "attention alone, with the residual stream, or behind the norm; none: behind the norm, attention if it crosses",
    ] = None,
    per_head: Annotated[bool, "one length per head (attention alone)"] = False,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Lengths `norm` [batch, layer, query, key] and `mixing_ratio` [batch, layer, query] of what reaches each position.

    `f_h(x_j) = v_j^h W_O^h` includes the value's bias but not that of W_O. `stage="attention"` gives
    `‖Σ_h A_ij^h f_h(x_j)‖`, with `per_head` `‖A_ij^h f_h(x_j)‖` [batch, layer, head, query, key]. "residual" adds `x_i`
    where i = j. "norm" then applies the layer norm behind the sum, `g ⊙ (y - mean(y)) / σ_i` without its bias. A model
    with the norm in front of the attention (GPT-2, Llama) has none behind the sum: there "norm" equals "residual",
    values come from the normed x and the residual is x itself. A norm on the attention's output alone (Gemma 2) scales
    its terms. `mixing_ratio = M/(M + P)`, `M = ‖Σ_{j≠i} y_ij‖`, `P = ‖y_ii‖`, at the same stage. Terms and biases are
    checked to add up to the model's own sum; edits of head outputs are refused. In cross-attention
    (`model.part("cross")`) keys are the encoder's tokens, what a position holds itself is none of them, and there is
    "attention" alone and no ratio.

    Question: How much does each token contribute to a position, by the length of what attention carries?
    Unit: norm of a vector of the residual stream; mixing_ratio: share from other tokens, 0 to 1.
    Source: Kobayashi et al. 2020, arXiv:2004.10102, and 2021, arXiv:2109.07152; held to the authors' code.
    Cost: one forward pass, then heads² products for each weight asked for; memory O(S·(queries + heads·d_model)).
    Not for: what the model uses of it later; contributions that cancel, as lengths do not add up to the sum's.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.norms(model, prompt)
    >>> found.norm.dims, found.mixing_ratio[0, :, 0].round(1).values.tolist()
    (('batch', 'layer', 'query', 'key'), [1.0, 0.5, 0.3, 0.3])
    """
    crosses = model.parts[model.part_name].crosses
    stage = stage or ("attention" if crosses else "norm")
    if crosses and stage != "attention":
        raise AnalysisError(
            f"stage={stage!r} joins what a position itself holds, which is no key of cross-attention; "
            'use stage="attention"'
        )
    if per_head and stage != "attention":
        raise AnalysisError(f'stage={stage!r} joins the heads; per_head=True needs stage="attention"')
    texts = Texts.of(model, examples, batch_size)
    columns = texts.columns(queries)
    heads = (model.n_heads,) if per_head else ()
    lengths = texts.empty(model.n_layers, *heads, columns.shape[1])
    ratios = torch.full((len(columns), model.n_layers, columns.shape[1]), torch.nan, dtype=torch.float64)
    for batch in texts.batches:
        rows, real = texts.rows(batch, columns)
        found = []
        for place, mixing in enumerate(mixings(model, batch).values()):
            behind = (mixing.first,) if stage == "norm" and mixing.first is not None else ()
            found.append(_asked(mixing, rows, real, stage != "attention", behind, per_head))
            if not crosses:
                ratio = _ratio(mixing, stage != "attention", behind).gather(1, rows)
                ratios[batch.places, place] = ratio.masked_fill(~real, torch.nan)
        texts.spread(batch, torch.stack(found, 1), lengths)
    coordinates = position_coordinates(texts, queries, columns, key_texts=texts.keys) | {
        "layer": model.layers
    }
    if per_head:
        coordinates["head"] = range(model.n_heads)
    dims = ("batch", "layer", *(("head",) if per_head else ()), "query", "key")
    result = xr.Dataset({"norm": (dims, lengths.numpy(), {"unit": "norm"})}, coords=coordinates)
    if crosses:
        return result
    return result.assign(mixing_ratio=(("batch", "layer", "query"), ratios.numpy(), {"unit": "share"}))


def _asked(
    mixing: Mixing, rows: Tensor, real: Tensor, residual: bool, behind: tuple[Norm, ...], per_head: bool
) -> Tensor:
    """Lengths in the asked rows [text, asked]: [text, (head,) asked, key]."""
    batch, heads, _, keys = mixing.map.shape
    out = torch.full((batch, rows.shape[1], *((heads,) if per_head else ()), keys), torch.nan).double()
    blocks = _by_head(mixing, rows) if per_head else norm_blocks(mixing, residual, behind, rows)
    for span, lengths in blocks:
        text, place = ((rows >= span.start) & (rows < span.stop) & real).nonzero(as_tuple=True)
        lengths = lengths.transpose(1, 2) if per_head else lengths
        out[text, place] = lengths[text, rows[text, place] - span.start].cpu()
    return out.transpose(1, 2) if per_head else out


def _by_head(mixing: Mixing, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `‖A_ij f_h(x_j)‖`, [batch, head, row, key]."""
    sizes = mixing.terms().norm(dim=-1)[:, :, None] if mixing.gate is None else None
    for span, weights in rows_of(mixing.map, rows):
        queries = range(span.start, span.stop)
        each = torch.stack([mixing.terms((), q).norm(dim=-1) for q in queries], 2) if sizes is None else sizes
        yield span, weights * each * mixing.scale[:, None, span, None]


def _ratio(mixing: Mixing, residual: bool, behind: tuple[Norm, ...]) -> Tensor:
    """M/(M + P) of every position, [batch, position]."""
    own = mixing.selves(residual, behind)
    others = (mixing.total(residual, behind) - own).norm(dim=-1)
    return (others / (others + own.norm(dim=-1))).cpu()
