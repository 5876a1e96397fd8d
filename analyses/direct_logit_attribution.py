"""Direct logit attribution: what each part of a model writes into the logit of an answer, with no layer in between.

The standard decomposition of the residual stream with the final norm's scale frozen (Elhage et al. 2021; Wang et al.
2022): the shares add up to the logit difference exactly. One run. What a part does by way of later layers is not seen.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._about import About
from headwater.analyses._examples import Batch, Examples
from headwater.analyses._measure import AnswerSetting, Explained, PositionSetting, WrongSetting
from headwater.analyses._settings import Bounds
from headwater.analyses._texts import Texts
from headwater.analyses._writers import Layer, Readout, Writers, soft_cap
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.record import provenance

ABOUT = About(
    question="What does each part write directly into the logit of an answer?",
    unit="logit (before a soft cap on logits)",
    paper="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022, arXiv:2211.00593",
    inputs="model+examples",
    cost="one forward pass, and one vector per part and position; per source token one product per head and key",
    not_for="what a part does through later layers (patch); models whose norms stand behind the sum (refused)",
)

Unit = Literal["component", "head", "source"]


def direct_logit_attribution(
    model: HookedModel,
    examples: Examples,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    unit: Annotated[Unit, "every part, the heads alone, or each head by source token"] = "component",
    position: PositionSetting = -1,
    batch_size: Annotated[int, "texts of equal length that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """`((c - mean(c))/s ⊙ g)·(W_U[answer] - W_U[wrong])` of every part c of the stream at `position`.

    `s` is the scale of the final norm as it is in the run (the mean is taken out by LayerNorm alone), g its gain.
    `unit="component"`: [batch, component] with "embed" (token and position), heads "0.0" …, "bias.0" (the output bias
    of an attention), "mlp.0" …, and "bias" (the final norm's and the unembedding's); they add up to the difference,
    the coordinate `total` [batch]. "head": the heads, [batch, layer, head]. "source": `A_ij v_j W_O^h`, [batch, layer,
    head, key], which adds up to "head" over the keys; refused where head outputs are edited. Without `wrong` the logit
    of the answer is taken apart. Logits with a soft cap (Gemma 2) are taken before it (attribute `soft_cap`).
    Sums are checked against the run; a model that does not add up is refused by name.
    Unit: logit. Source: formulas checked; papers from memory.
    """
    if unit not in get_args(Unit):
        raise AnalysisError(f"unit={unit!r} is unknown; give one of {', '.join(get_args(Unit))}")
    explained = Explained(model, None, answer, wrong, position, "logit")
    texts = Texts.of(model, examples, batch_size)
    rows: dict[int, Tensor] = {}
    totals = torch.zeros(len(texts.valid), dtype=torch.float64)
    names: list[str] = []
    for batch in texts.batches:
        explained.of(batch)  # refuses a position that is not there
        run = Writers.of(model, batch)
        readout = _readout(explained, run, batch, position)
        totals[batch.places] = readout.total.cpu()
        if unit == "component":
            shares = {name: readout.shares(vectors[:, position]) for name, vectors in run.parts()}
            names = [*shares, "bias"]
            found = torch.stack([*shares.values(), readout.bias], -1)
        else:
            each = _by_head if unit == "head" else _by_source
            found = torch.stack([each(layer, readout, position) for layer in run.layers.values()], 1)
        rows |= dict(zip(batch.places, found.cpu(), strict=True))
    return _labelled(model, texts, rows, unit, names, totals, explained)


def _readout(explained: Explained, run: Writers, batch: Batch, position: int) -> Readout:
    right, other = (explained.ids_of(what, batch) for what in ("answer", "wrong"))
    device = run.logits.device
    asked = run.logits[:, position].argmax(-1) if right is None else torch.tensor(right, device=device)
    return Readout.of(run, position, asked, None if other is None else torch.tensor(other, device=device))


def _by_head(layer: Layer, readout: Readout, position: int) -> Tensor:
    return readout.shares(layer.result[:, position])


def _by_source(layer: Layer, readout: Readout, position: int) -> Tensor:
    """[batch, head, key]: each key's value, weighed, through W_O and the final norm."""
    return readout.shares(moved(layer, position))


def moved(layer: Layer, position: int) -> Tensor:
    """`A_ij v_j W_O^h` as it stands in the stream at query `position`, [batch, head, key, d_model]."""
    count, heads, queries, _ = layer.map.shape
    at = position % queries
    weights = layer.map.tile(slice(at, at + 1), slice(None))[:, :, 0].double()
    values = layer.value.repeat_interleave(heads // layer.value.shape[1], 1)
    terms = torch.einsum("bhk,bhke,hed->bhkd", weights, values, layer.output)
    if layer.behind is not None:
        terms = layer.behind.linear(terms) / layer.behind.deviation[:, at].reshape(count, 1, 1, 1)
    seen = layer.result[:, at]
    if (terms.sum(2) - seen).norm() > 1e-3 * seen.norm() + 1e-6:
        raise AnalysisError("head outputs are edited, so they are not what the weights make of the values")
    return terms


def _labelled(
    model: HookedModel, texts: Texts, rows: dict[int, Tensor], unit: Unit, names: list[str], totals: Tensor,
    explained: Explained,
) -> xr.DataArray:  # fmt: skip
    """The rows of all texts under their names; keys of padding are NaN."""
    coordinates: dict[str, object] = {"batch": np.arange(len(totals)), "total": ("batch", totals)}
    if unit == "component":
        dims, values = ("batch", "component"), torch.stack([rows[n] for n in range(len(rows))])
        coordinates["component"] = names
    else:
        coordinates |= {"layer": model.layers, "head": np.arange(model.n_heads)}
        dims = ("batch", "layer", "head")
        if unit == "head":
            values = torch.stack([rows[n] for n in range(len(rows))])
        else:
            dims, values = (*dims, "key"), texts.empty(model.n_layers, model.n_heads)
            for n, row in rows.items():
                values[n][..., texts.valid[n]] = row
            coordinates["key_token"] = (("batch", "key"), np.array(texts.strings))
    attrs = ABOUT.attrs(provenance(model), unit_of=unit, soft_cap=soft_cap(model), **explained.settings)
    return xr.DataArray(
        values.numpy(), dims=dims, coords=coordinates, name="direct_logit_attribution", attrs=attrs
    )
