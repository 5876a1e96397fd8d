"""What a head moves: its share of a logit, by the token it looks at and by what wrote that token's stream.

The value and output maps of Elhage et al. 2021 with both norms' scales frozen and the weights as they are: the terms
add up to the head's direct logit attribution. One run. Why the weights are so is not told (qk_decomposition).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._about import About
from headwater.analyses._examples import Examples
from headwater.analyses._measure import AnswerSetting, Explained, PositionSetting, WrongSetting
from headwater.analyses._reading import Reading, check_sum, one_head
from headwater.analyses._settings import Bounds
from headwater.analyses._texts import Texts
from headwater.analyses._writers import Readout, Writers, soft_cap
from headwater.lens.heads import Head
from headwater.lens.model import HookedModel
from headwater.lens.record import provenance
from headwater.lens.weights import head_weights

ABOUT = About(
    question="What does a head move into a logit: from which token, and written there by whom?",
    unit="logit (before a soft cap on logits)",
    paper="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    inputs="model+examples",
    cost="one forward pass, and one product per key and part",
    not_for="what the head does through later layers; models whose norms stand behind the sum (refused)",
)


def ov_decomposition(
    model: HookedModel,
    examples: Examples,
    head: Annotated[str, "the head, as 5.1"] = "0.0",
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    batch_size: Annotated[int, "texts of equal length that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """`A_ij · (c W_V W_O)·u` [batch, key, component] for every key j and every part c of its stream, i at `position`.

    u reads the logit of the answer (less that of a wrong one) off the stream through the final norm, whose scale, like
    that of the norm in front of the attention, is as it is in the run. Parts are "embed", heads, "bias.l" and "mlp.l"
    of the layers before, and "bias" (of the norm in front and of W_V). The sum over keys and parts is the head's share
    in `direct_logit_attribution`, the coordinate `total` [batch].
    Unit: logit. Source: algebra, checked against dense runs; the paper from memory.
    """
    wanted = one_head(model, head)
    explained = Explained(model, None, answer, wrong, position, "logit")
    texts = Texts.of(model, examples, batch_size)
    rows: dict[int, Tensor] = {}
    totals = torch.zeros(len(texts.valid), dtype=torch.float64)
    names: list[str] = []
    for batch in texts.batches:
        explained.of(batch)  # refuses a position that is not there
        run = Writers.of(model, batch)
        right, other = (explained.ids_of(what, batch) for what in ("answer", "wrong"))
        asked = run.logits[:, position].argmax(-1) if right is None else torch.tensor(right)
        readout = Readout.of(
            run, position, asked.to(run.logits.device),
            None if other is None else torch.tensor(other, device=run.logits.device),
        )  # fmt: skip
        reading = Reading.of(run, wanted.layer)
        names = reading.names
        terms, total = _terms(run, reading, readout, wanted, position)
        totals[batch.places] = total.cpu()
        rows |= dict(zip(batch.places, terms.cpu(), strict=True))
    values = texts.empty(len(names))
    for n, row in rows.items():
        values[n][:, texts.valid[n]] = row.T
    return xr.DataArray(
        values.movedim(1, 2).numpy(),
        dims=("batch", "key", "component"),
        coords={
            "batch": np.arange(len(totals)), "component": names, "total": ("batch", totals),
            "key_token": (("batch", "key"), np.array(texts.strings)),
        },
        name="ov_decomposition",
        attrs=ABOUT.attrs(provenance(model), head=str(wanted), soft_cap=soft_cap(model), **explained.settings),
    )  # fmt: skip


def _terms(
    run: Writers, reading: Reading, readout: Readout, head: Head, position: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[batch, key, component], and the head's share [batch]."""
    model, layer = run.model, run.layers[head.layer]
    weights = head_weights(model, head.layer)
    shared = head.head // (model.n_heads // model.n_kv_heads)
    at = position % layer.map.shape[2]
    written = layer.output[head.head].expand(layer.map.shape[0], -1, -1)
    if layer.behind is not None:
        written = layer.behind.linear(written) / layer.behind.deviation[:, at, None, None]
    values = reading.through(weights.W_V[shared], weights.b_V[shared])
    given = torch.einsum("bkce,be->bkc", values, readout.shares(written))
    looked = layer.map.tile(slice(at, at + 1), slice(None))[:, head.head, 0].double()
    terms = looked[..., None] * given
    total = readout.shares(layer.result[:, at, head.head])
    check_sum(terms.sum((1, 2)), total, f"what head {head} of {model.name} moves")
    return terms, total
