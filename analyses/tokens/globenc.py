"""GlobEnc: how much of each input token is in a position, by norms through the residual stream and both layer norms.

Modarressi et al. 2022 (arXiv 2205.03286). Each layer's map of norms is multiplied down row by row, so memory is linear
in the length. The MLP's output is left out, except where it enlarges the scale of the second norm.
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
from headwater.analyses._streams.attention_terms import Mixing, mixings, norm_blocks
from headwater.analyses._streams.between_layers import refuse_crossing, refuse_mixers
from headwater.analyses.tokens._sinks_aside import one_token_of_product
from headwater.lens.model import HookedModel


@analysis
def globenc(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[Positions, 'positions to explain, e.g. -1; "all" for every one'] = (-1,),
    normalise: Annotated[bool, "divide each layer's rows by their sum before the product"] = False,
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """Rows of `N_L ··· N_1`, `N_l[i, j] = ‖LN₂(LN₁(Σ_h A_ij^h f_h(x_j) + 1[i=j] x_i))‖`, as [batch, query, key].

    `LN₁` and `LN₂` are the linear parts of the norms behind attention and MLP, `g ⊙ (y - mean(y)) / σ_i` without bias;
    σ is that of the sums in the run. The plain product has no scale, as in the released code. `normalise=True` turns
    each layer's rows into shares first, which can slightly change the order within a row. A model with norms in front
    (GPT-2, Llama) has none behind the sums, so both steps fall away there: the method is made for BERT.

    Question: How much of each input token is in a position, by norms through the layers?
    Unit: product of norms, no scale (normalise: share of the position, each row sums to 1).
    Source: Modarressi et al. 2022, arXiv:2205.03286; held to the authors' code.
    Cost: one forward pass, then heads² products per weight of every layer; memory O(S·(queries + heads·d_model)).
    Not for: what the MLPs do to a token; comparing layers or models without normalise, as the scale grows with depth.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.globenc(model, prompt, normalise=True)
    >>> found.shape, float(found.sum().round(1))
    ((1, 1, 15), 1.0)
    """

    refuse_mixers(model.name, model.mixers, "globenc")
    refuse_crossing(model, "globenc")

    def layers(batch: Batch) -> list[Pull]:
        return [partial(_pulled, mixing, normalise) for mixing in reversed(mixings(model, batch).values())]

    texts = Texts.of(model, examples, batch_size)
    return one_token_of_product(texts.rows_down(queries, layers, "globenc"), texts, model.causal)


def _pulled(mixing: Mixing, normalise: bool, rows: Tensor) -> Tensor:
    """`rows @ N` of one layer, block by block: [batch, asked, key]."""
    rows = rows.to(mixing.value.device)
    both = tuple(norm for norm in (mixing.first, mixing.second) if norm is not None)
    out = torch.zeros_like(rows)
    for span, lengths in norm_blocks(mixing, residual=True, norms=both):
        if normalise:
            lengths = lengths / lengths.sum(-1, keepdim=True)
        out += rows[..., span] @ lengths
    return out
