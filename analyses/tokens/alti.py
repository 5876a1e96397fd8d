"""ALTI: how much of each input token is in a position, by how close its term is to the block's attention output.

Ferrando, Gállego & Costa-jussà 2022 (arXiv 2203.04212). The distance is a 1-norm, which needs the vector of every pair
of tokens. Vectors are made for a few rows at a time: memory is linear in the length, time is layers·S²·d_model.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.positions import Positions
from headwater.analyses._prompts.texts import Pull, Texts
from headwater.analyses._streams.attention_terms import Mixing, mixings
from headwater.analyses._streams.between_layers import refuse_mixers
from headwater.analyses.tokens._sinks_aside import one_token_of_product
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

    Question: How much of each input token is in a position, by the nearness of its term to the whole?
    Unit: share of the position, each row sums to 1.
    Source: Ferrando, Gállego & Costa-jussà 2022, arXiv:2203.04212; held to the authors' code, whose default scaling
    this is.
    Cost: one forward pass, then one vector per pair of tokens and layer: time O(layers·S²·heads·d_model), memory O(S).
    Not for: what the MLPs do to a token; tokens that push against the output, which count as nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.alti(model, prompt)
    >>> found.key_token.values[0, found[0, 0].values.argmax()].item(), float(found.sum().round(1))
    ('John', 1.0)
    """

    refuse_mixers(model.name, model.mixers, "alti")

    def layers(batch: Batch) -> list[Pull]:
        return [partial(_pulled, mixing) for mixing in reversed(mixings(model, batch).values())]

    texts = Texts.of(model, examples, batch_size, LONGEST)
    return one_token_of_product(texts.rows_down(queries, layers, "alti"), texts, model.causal)


def _pulled(mixing: Mixing, rows: Tensor) -> Tensor:
    """`rows @ C` of one layer, a few rows of C at a time: [batch, asked, key]."""
    rows = rows.to(mixing.value.device)
    norms = () if mixing.first is None else (mixing.first,)
    own, divisor = mixing.own(norms), mixing.divisor(norms)
    out = torch.zeros_like(rows)
    elements = max(ELEMENTS // mixing.entering.shape[-1], 1) * mixing.map.shape[1]
    for span, vectors in mixing.vectors(mixing.map.row_blocks(elements=elements), norms):
        vectors = vectors * mixing.scale[:, None, span, None]
        place = torch.arange(span.start, span.stop)
        vectors[:, place, place - span.start] += own[:, span]
        vectors = vectors / divisor[:, None, span, None]
        out += rows[..., span] @ _shares(mixing.mixed[:, span], vectors, place)
    return out


def _shares(whole: Tensor, vectors: Tensor, place: Tensor) -> Tensor:
    """Rows of C [batch, row, key] from outputs [batch, row, d_model] and their vectors [batch, key, row, d_model]."""
    near = whole.abs().sum(-1)[:, None] - (whole[:, None] - vectors).abs().sum(-1)
    shares = near.clamp_min(0).mT
    # a masked key has a term of zeros, whose nearness is 0 but for rounding
    shares = shares.masked_fill(~(vectors.abs().amax(-1) > 0).mT, 0.0)
    total = shares.sum(-1, keepdim=True)
    stay = torch.nn.functional.one_hot(place, shares.shape[-1]).to(shares)
    return torch.where(total > 0, shares / total.clamp_min(torch.finfo(total.dtype).tiny), stay)
