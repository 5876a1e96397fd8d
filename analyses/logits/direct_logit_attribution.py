"""Direct logit attribution: what each part of a model writes into the logit of an answer, with no layer in between.

The standard decomposition of the residual stream with the final norm's scale frozen (Elhage et al. 2021; Wang et al.
2022), or with the norm integrated along a path of streams, so that nothing is frozen: the shares add up to the logit
difference exactly. One run. What a part does by way of later layers is not seen.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.measure import AnswerSetting, Explained, PositionSetting, WrongSetting
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.readout import Readout, soft_cap, unembedding
from headwater.analyses._streams.writers import EMBED, Layer, Writers
from headwater.analyses.logits._answer_position import answers_of
from headwater.analyses.logits._final_norm import PathReadout
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks
from headwater.lens.models.closeness import close_or_refuse

Unit = Literal["component", "head", "source"]
FinalNorm = Literal["frozen", "path_from_zero", "path_from_embedding"]


@analysis
def direct_logit_attribution(
    model: HookedModel,
    examples: Examples,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    unit: Annotated[Unit, "every part, the heads alone, or each head by source token"] = "component",
    norm: Annotated[FinalNorm, "the final norm: its scale as it is, or exact along a path"] = "frozen",
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

    With a path nothing is frozen: c gives `c·∫ ∇f(a + α(x - a)) dα`, α from 0 to 1, x the stream and f the logit behind
    the norm, in closed form; a is 0, or the embedding, whose share then is f(a), the logit of the embedding by itself.
    A part that turns the stream away from the answer is charged for it, and one along the stream gets less than when
    frozen; both agree where the norm's scale does not change. From zero the norm is steepest where there is next to
    no stream, so that shares of parts across x grow with log(|x|²/epsilon) and cancel: prefer the embedding. A norm
    behind an attention (Gemma 2) stays the division that it was.
    Unit: logit. Source: formulas checked; the closed form is ours; papers from memory.

    Question: What does each part write directly into the logit of an answer?
    Unit: logit (before a soft cap on logits).
    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022,
    arXiv:2211.00593.
    Cost: one forward pass, and one vector per part and position; per source token one product per head and key.
    Not for: what a part does through later layers (patch); models whose norms stand behind the sum (refused).
    """
    explained = Explained(model, None, answer, wrong, position, "logit")
    texts = Texts.of(model, examples, batch_size)
    rows: dict[int, Tensor] = {}
    totals = torch.zeros(len(texts.valid), dtype=torch.float64)
    names: list[str] = []
    for batch in texts.batches:
        place_of(position, batch.ids.shape[1], f"example {batch.places[0]}")
        run = Writers.of(model, batch)
        readout = Readout.of(run, position, *answers_of(explained, run, batch))
        totals[batch.places] = readout.total.cpu()
        path = _path(run, readout, norm, position)
        if unit == "component":
            shares = {name: path.shares(vectors[:, position]) for name, vectors in run.parts()}
            if isinstance(path, PathReadout) and norm == "path_from_embedding":
                shares[EMBED] = path.begun
            names = [*shares, "bias"]
            found = torch.stack([*shares.values(), readout.bias], -1)
        else:
            each = _by_head if unit == "head" else _by_source
            found = torch.stack([each(layer, path, position) for layer in run.layers.values()], 1)
        rows |= dict(zip(batch.places, found.cpu(), strict=True))
    return _labelled(model, texts, rows, (unit, norm), names, totals, explained)


def _path(run: Writers, readout: Readout, norm: FinalNorm, position: int) -> Readout | PathReadout:
    """What gives parts their shares."""
    if norm == "frozen":
        return readout
    module, _ = unembedding(run.model)
    end = run.last[:, position]
    embedded = run.layers[run.model.layers[0]].entering[:, position]
    begin = torch.zeros_like(end) if norm == "path_from_zero" else embedded
    return PathReadout.of(readout, blocks.epsilon(module), begin, end)


def _by_head(layer: Layer, readout: Readout | PathReadout, position: int) -> Tensor:
    return readout.shares(layer.result[:, position])


def _by_source(layer: Layer, readout: Readout | PathReadout, position: int) -> Tensor:
    """[batch, head, key]: each key's value, weighed, through W_O and the final norm."""
    return readout.shares(moved(layer, position))


def moved(layer: Layer, position: int) -> Tensor:
    """`A_ij v_j W_O^h` as it stands in the stream at query `position`, [batch, head, key, d_model]."""
    _, heads, queries, _ = layer.map.shape
    at = position % queries
    weights = layer.map.tile(slice(at, at + 1), slice(None))[:, :, 0].double()
    values = layer.value.repeat_interleave(heads // layer.value.shape[1], 1)
    terms = torch.einsum("bhk,bhke,hed->bhkd", weights, values, layer.output)
    terms = layer.written(terms, at)
    what = "head outputs are edited, so they are not what the weights make of the values"
    close_or_refuse(terms.sum(2), layer.result[:, at], what)
    return terms


def _labelled(
    model: HookedModel, texts: Texts, rows: dict[int, Tensor], how: tuple[Unit, FinalNorm], names: list[str],
    totals: Tensor, explained: Explained,
) -> xr.DataArray:  # fmt: skip
    """The rows of all texts under their names; keys of padding are NaN."""
    unit, norm = how
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
    attrs = {"unit_of": unit, "norm": norm, "soft_cap": soft_cap(model), **explained.settings}
    return xr.DataArray(
        values.numpy(), dims=dims, coords=coordinates, name="direct_logit_attribution", attrs=attrs
    )
