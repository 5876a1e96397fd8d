"""Why a head looks at a token: its score for one pair of tokens, by the parts that wrote the query and the key.

The bilinear form of Elhage et al. 2021 with the norm's scale frozen and the rotation of positions applied, part by
part: the terms add up to the score exactly. The rotation is that of unit vectors in a run. Softmax is not decomposed: a
score says nothing without the scores of the other keys.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.head_inputs import Reading, one_head, refuse_other_sum, rotations
from headwater.analyses._streams.writers import Writers
from headwater.kernels.tiles.block import Block
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import head_weights
from headwater.lens.naming.heads import Head


@analysis
def qk_decomposition(
    model: HookedModel,
    examples: Examples,
    head: Annotated[str | Head, "the head, as 5.1"] = "0.0",
    query: Annotated[int, "token position that looks"] = -1,
    key: Annotated[int | None, "token position looked at; none: where its weight is largest"] = None,
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """`scale · (R_i W_Q c_a)·(R_j W_K c_b)` [batch, query_part, key_part] for every part of the stream on either side.

    Parts are "embed", the heads, "bias.l" and "mlp.l" of the layers before, and "bias": what the norm in front and the
    projections add. c is a part behind that norm, with the norm's scale of the run; R rotates by position, where the
    model does. The terms add up to the score, the coordinate `total` [batch]; `key` [batch] is the position looked at.
    Soft caps, ALiBi and other biases of the score are applied later and are not in it.

    Question: Why does a head look at this token: which parts of the model made the score?
    Unit: score (scaled, before a soft cap, biases of position and softmax).
    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (from memory); algebra held to dense
    runs.
    Cost: two forward passes, and one of d_head texts of two tokens, or of the whole text where a rotation depends on
    more than the position; parts² products.
    Not for: why not elsewhere (compare two keys); heads whose queries and keys are normalised (refused).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.qk_decomposition(model, prompt, head="2.0")
    >>> found.shape, int(found.key[0]), float(found.total[0].round(1))  # key 2 is Mary
    ((1, 22, 22), 2, 8.3)
    """
    wanted = one_head(model, head)
    texts = Texts.of(model, examples, batch_size)
    count = len(texts.valid)
    rows: dict[int, Tensor] = {}
    totals, keys = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.long)
    names: list[str] = []
    for batch in texts.batches:
        run = Writers.of(model, batch)
        reading = Reading.of(run, wanted.layer)
        names = reading.names
        i, looked = _places(run, wanted, texts.length(batch), batch, query, key)
        for row, place in enumerate(batch.places):
            terms, total = _terms(run, reading, wanted, batch, row, (i, int(looked[row])))
            rows[place], totals[place], keys[place] = terms.cpu(), total, looked[row]
    return xr.DataArray(
        torch.stack([rows[n] for n in range(count)]).numpy(),
        dims=("batch", "query_part", "key_part"),
        coords={
            "batch": np.arange(count), "query_part": names, "key_part": names, "total": ("batch", totals),
            "key": ("batch", keys),
        },
        name="qk_decomposition",
        attrs={"head": str(wanted)},
    )  # fmt: skip


def _places(
    run: Writers, head: Head, length: int, batch: Batch, query: int, key: int | None
) -> tuple[int, Tensor]:
    """The position of the query, and of the key in each text."""
    of = f"example {batch.places[0]}"
    i = place_of(query, length, of, "query")
    map = run.layers[head.layer].map
    if key is not None:
        j = place_of(key, length, of, "key")
        pair = Block(slice(0, len(batch.ids)), torch.tensor([head.head]), slice(i, i + 1), slice(j, j + 1))
        seen = map.mask.tile(pair, map.q.device)
        if seen is not None and not seen.all():
            raise AnalysisError(
                f"query={query} does not see key={key} in layer {head.layer} of {run.model.name}; give a key that its "
                "mask lets it see"
            )
        return i, torch.full((len(batch.ids),), j)
    weights = map.tile(slice(i, i + 1), slice(None))
    return i, weights[:, head.head, 0].argmax(-1).cpu()


def _terms(
    run: Writers, reading: Reading, head: Head, batch: Batch, row: int, places: tuple[int, int]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[query part, key part] of one text, and the score of the run."""
    model, map = run.model, run.layers[head.layer].map
    weights = head_weights(model, head.layer)
    shape = model.shape(head.layer)
    shared = head.head // (shape.heads // shape.kv)
    one = Batch(batch.rows([row]), [0])
    turns = rotations(model, one, head, places)
    queries = reading.through(weights.W_Q[head.head], weights.b_Q[head.head])[row, places[0]] @ turns[0]
    keys = reading.through(weights.W_K[shared], weights.b_K[shared])[row, places[1]] @ turns[1]
    terms = map.rule.scale * queries @ keys.T
    seen = map.q[row, head.head, places[0]].double(), map.k[row, shared, places[1]].double()
    what = f"the score of head {head} of {model.name}"
    refuse_other_sum(model, queries.sum(0), seen[0], what)
    refuse_other_sum(model, keys.sum(0), seen[1], what)
    return terms, (map.rule.scale * seen[0] @ seen[1]).cpu()
