"""ALTI: how much of each input token is in a position, by how close its term is to the block's attention output.

Ferrando, Gállego & Costa-jussà 2022 (arXiv 2203.04212), and with an encoder beside the decoder Ferrando et al. 2022
(arXiv 2205.11631). The distance is a 1-norm, which needs the vector of every pair
of tokens. Vectors are made for a few rows at a time: memory is linear in the length, time is layers·S²·d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._inputs.entrances import sides_of
from headwater.analyses._inputs.inputs import Inputs
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.positions import Positions
from headwater.analyses._prompts.texts import Pull, Texts, indicators
from headwater.analyses._streams.attention_terms import Mixing, mixings
from headwater.analyses._streams.between_layers import refuse_mixers
from headwater.analyses.tokens._sinks_aside import one_token_of_product
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

LONGEST = 4096  # tokens; beyond, a layer of width 1024 takes 10^14 operations
ELEMENTS = 2**22  # numbers in the vectors of a block of rows


@analysis
def alti(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[Positions, 'positions to explain, e.g. -1; "all" for every one'] = (-1,),
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """Rows of `C_L ··· C_1`, `C[i, j] = rownorm(max(0, ‖y_i‖₁ - ‖y_i - T_ij‖₁))`, as [batch, query, key].

    `T_ij = Σ_h A_ij^h f_h(x_j) + 1[i=j] x_i`, passed through the linear part of the norm that follows, where there is
    one (BERT). `y_i` is the model's own sum there: attention and residual stream with biases, normed. C holds the
    residual stream, so no identity is mixed in. A row of zeros (no term points to the output) keeps its own position.
    Texts of more than 4,096 tokens are refused, since they would take too long.

    Encoder–decoder models (T5, BART, Whisper): `examples` hold both sides; `queries` are of the decoder.
    Cross-attention has a matrix of the same form over the encoder's tokens and the position itself, whose term is the
    residual stream. Shares go down through it to both sides; those of the encoder go on down its layers. The keys are
    the encoder's tokens, then the decoder's, told apart by the coordinate `key_part`; a row sums to 1 over both.

    Question: How much of each input token is in a position, by the nearness of its term to the whole?
    Unit: share of the position, each row sums to 1.
    Source: Ferrando, Gállego & Costa-jussà 2022, arXiv:2203.04212; held to the authors' code, whose default scaling
    this is. Encoder–decoder: Ferrando et al. 2022, arXiv:2205.11631 (ALTI+), from memory.
    Cost: one forward pass, then one vector per pair of tokens and layer: time O(layers·S²·heads·d_model), memory O(S).
    Not for: what the MLPs do to a token; tokens that push against the output, which count as nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.alti(model, prompt)
    >>> found.key_token.values[0, found[0, 0].values.argmax()].item(), float(found.sum().round(1))
    ('John', 1.0)
    """

    for side in sides_of(model):
        refuse_mixers(model.name, side.mixers, "alti")
    if model.part_name == "cross" or model.other_attention:
        return _across(Inputs.of(model, examples, batch_size, LONGEST), queries)

    def layers(batch: Batch) -> list[Pull]:
        return [partial(_pulled, mixing) for mixing in reversed(mixings(model, batch).values())]

    texts = Texts.of(model, examples, batch_size, LONGEST)
    return one_token_of_product(texts.rows_down(queries, layers, "alti"), texts, model.causal)


def _across(inputs: Inputs, queries: Positions) -> xr.DataArray:
    """Rows of the products through both sides, [batch, query, key]: the encoder's tokens, then the decoder's."""
    model = inputs.model
    if len(inputs.sides) < 2:
        raise AnalysisError(
            f"the cross-attention of {model.name} reads states that none of its parts ({', '.join(model.parts)}) "
            "gives, so shares can not be followed into them; read another part"
        )
    encoder, decoder = inputs.sides
    source, target = inputs.texts
    columns = target.columns(queries)
    own, across = target.empty(columns.shape[1]), source.empty(columns.shape[1])
    for batch in inputs.batches:
        mine = indicators(*target.rows(batch, columns), target.length(batch))
        others = torch.zeros(*mine.shape[:2], source.length(batch), dtype=torch.float64)
        crossing = mixings(model.part("cross"), batch)
        for layer, mixing in reversed(mixings(decoder, batch).items()):
            if layer in crossing:
                mine, more = _crossed(crossing[layer], mine)
                others = others.to(more) + more
            mine = _pulled(mixing, mine)
        for mixing in reversed(mixings(encoder, batch).values()):
            others = _pulled(mixing, others)
        target.spread(batch, mine, own)
        source.spread(batch, others, across)
    return inputs.by_query([across, own], queries, columns, "alti")


def _pulled(mixing: Mixing, rows: Tensor) -> Tensor:
    """`rows @ C` of one layer, a few rows of C at a time: [batch, asked, key]."""
    rows = rows.to(mixing.value.device)
    out = torch.zeros_like(rows)
    for span, vectors, own in _terms(mixing):
        place = torch.arange(span.start, span.stop)
        vectors[:, place, place - span.start] += own
        shares = _shares(mixing.mixed[:, span], vectors)
        stay = torch.nn.functional.one_hot(place, shares.shape[-1]).to(shares)
        out += rows[..., span] @ torch.where(shares.sum(-1, keepdim=True) > 0, shares, stay)
    return out


def _crossed(mixing: Mixing, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows @ C` of cross-attention: the shares that stay with the queries, and those of the encoder's tokens."""
    rows = rows.to(mixing.value.device)
    stays, out = [], rows.new_zeros(*rows.shape[:2], mixing.map.shape[3])
    for span, vectors, own in _terms(mixing):
        shares = _shares(mixing.mixed[:, span], torch.cat([vectors, own[:, None]], 1))
        stay = torch.where(shares.sum(-1) > 0, shares[..., -1], 1.0)
        stays.append(rows[..., span] * stay[:, None])
        out += rows[..., span] @ shares[..., :-1]
    return torch.cat(stays, -1), out


def _terms(mixing: Mixing) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows: the vector of each key [batch, key, row, d_model] and the residual's [batch, row, d_model]."""
    norms = () if mixing.first is None else (mixing.first,)
    own, divisor = mixing.own(norms), mixing.divisor(norms)
    elements = max(ELEMENTS // mixing.entering.shape[-1], 1) * mixing.map.shape[1]
    for span, vectors in mixing.vectors(mixing.map.row_blocks(elements=elements), norms):
        over = divisor[:, span, None]
        yield span, vectors * (mixing.scale[:, span, None] / over)[:, None], own[:, span] / over


def _shares(whole: Tensor, vectors: Tensor) -> Tensor:
    """Rows of C [batch, row, key] from outputs [batch, row, d_model] and their vectors [batch, key, row, d_model]; rows
    of zeros where no vector points to the output."""
    near = whole.abs().sum(-1)[:, None] - (whole[:, None] - vectors).abs().sum(-1)
    shares = near.clamp_min(0).mT
    # a masked key has a term of zeros, whose nearness is 0 but for rounding
    shares = shares.masked_fill(~(vectors.abs().amax(-1) > 0).mT, 0.0)
    return shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
