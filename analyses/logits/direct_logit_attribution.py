"""Direct logit attribution: what each part of a model adds to the logit of an answer, without later layers in between.

The standard decomposition of the residual stream freezes the final norm's scale (Elhage et al. 2021; Wang et al. 2022).
The norm can also be integrated along a path of streams: nothing is frozen, and the shares add up to the logit
difference exactly. One run. What a part does by way of later layers is not seen.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._measures.measure import AnswerSetting, Explained, PositionSetting, WrongSetting
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.ending import at
from headwater.analyses._streams.readout import Readout, soft_cap
from headwater.analyses._streams.writers import EMBED, Layer, Writers
from headwater.analyses.logits._answer_position import answers_of
from headwater.analyses.logits._final_norm import PathReadout
from headwater.lens.model import HookedModel
from headwater.lens.models import norms
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
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """`((c - mean(c))/s ⊙ g)·(W_U[answer] - W_U[wrong])` of every part c of the stream at `position`.

    `s` is the scale of the final norm in the run, g its gain; only a LayerNorm subtracts the mean. `unit="component"`
    gives [batch, component]: "embed" (token and position), heads "0.0" …, "bias.0" (the output bias of an attention),
    "mlp.0" …, and "bias" (of the final norm and the unembedding). They add up to the difference, the coordinate `total`
    [batch]. "head" gives the heads [batch, layer, head]. "source" gives `A_ij v_j W_O^h` [batch, layer, head, key],
    whose sum over keys is "head"; it is refused where head outputs are edited. Without `wrong` the logit of the answer
    is decomposed. Logits with a soft cap (Gemma 2) are those before it (attribute `soft_cap`). The sums are checked
    against the run; a model that does not add up is refused by name.

    Of a head of classes it is the logit of a class, at the position that the head reads. Of two towers it is the
    similarity of each text and its own picture, with the lengths of both embeddings of the run, to which the parts of
    one tower add up (`model.part("vision")`). In a decoder the heads of cross-attention are parts too, "cross.0.0"; of
    `model.part("cross")` they are the heads, whose keys are the encoder's tokens, beside "decoder.0.0".

    With a path, c gives `c·∫ ∇f(a + α(x - a)) dα`, α from 0 to 1, in closed form; x is the stream and f the logit
    through the norm. The start a is 0, or the embedding, whose share is then f(a), the logit of the embedding alone. A
    part that turns the stream away from the answer is charged for it; a part along the stream gets less than with a
    frozen scale; both agree where the norm's scale is constant. From zero, the norm is steepest where there is almost
    no stream, so shares of parts across x grow with log(|x|²/epsilon) and cancel: prefer the embedding. A norm behind
    an attention (Gemma 2) keeps its scale of the run.

    Question: What does each part write directly into the logit of an answer?
    Unit: logit (before a soft cap on logits).
    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022, arXiv:2211.00593
    (from memory); the closed form of the path is ours.
    Cost: one forward pass, and one vector per part and position; per source token one product per head and key.
    Not for: what a part does through later layers (patch); models whose norms stand behind the sum (refused).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.direct_logit_attribution(model, prompt, answer="Mary", wrong="John")
    >>> found.component.values[found[0].values.argmax()].item(), bool(abs(found.sum() - found.total[0]) < 1e-3)
    ('mlp.3', True)
    """
    explained = Explained(model, None, answer, wrong, position, "logit", of_classes=True)
    texts = Texts.of(model, examples, batch_size)
    rows: dict[int, Tensor] = {}
    totals = torch.zeros(len(texts.valid), dtype=torch.float64)
    names: list[str] = []
    for batch in texts.batches:
        place_of(position, texts.length(batch), f"example {batch.places[0]}")
        run = Writers.of(model, batch)
        places = run.at(position)
        readout = Readout.of(run, position, *answers_of(explained, run, batch))
        totals[batch.places] = readout.total.cpu()
        path = _path(run, readout, norm, places)
        if unit == "component":
            shares = {name: path.shares(at(vectors, places)) for name, vectors in run.parts()}
            if isinstance(path, PathReadout) and norm == "path_from_embedding":
                shares[EMBED] = path.begun
            names = [*shares, "bias"]
            found = torch.stack([*shares.values(), readout.bias], -1)
        else:
            source = unit == "source"
            written = (moved(x, places) if source else at(x.result, places) for x in run.layers.values())
            found = torch.stack([path.shares(vectors) for vectors in written], 1)
        rows |= dict(zip(batch.places, found.cpu(), strict=True))
    return _labelled(model, texts, rows, unit, names, totals)


def _path(run: Writers, readout: Readout, norm: FinalNorm, places: Tensor) -> Readout | PathReadout:
    """The readout that gives parts their shares."""
    if norm == "frozen":
        return readout
    end, embedded = at(run.last, places), at(run.embedded, places)
    begin = torch.zeros_like(end) if norm == "path_from_zero" else embedded
    return PathReadout.of(readout, norms.epsilon(run.end.norm), begin, end)


def moved(layer: Layer, places: Tensor) -> Tensor:
    """`A_ij v_j W_O^h` as it is in the stream at the query of each row, [batch, head, key, d_model]."""
    asked = places.unique().tolist()
    found = _moved(layer, asked[0])
    for place in asked[1:]:
        found = torch.where((places == place)[:, None, None, None], _moved(layer, place), found)
    return found


def _moved(layer: Layer, at: int) -> Tensor:
    heads = layer.map.shape[1]
    weights = layer.map.tile(slice(at, at + 1), slice(None))[:, :, 0].double()
    values = layer.value.repeat_interleave(heads // layer.value.shape[1], 1)
    written = layer.gated(at).expand(len(values), -1, -1, -1)
    terms = torch.einsum("bhk,bhke,bhed->bhkd", weights, values, written)
    terms = layer.written(terms, at)
    what = "head outputs are edited, so they are not what the weights make of the values"
    close_or_refuse(terms.sum(2), layer.result[:, at], what)
    return terms


def _labelled(
    model: HookedModel, texts: Texts, rows: dict[int, Tensor], unit: Unit, names: list[str], totals: Tensor
) -> xr.DataArray:  # fmt: skip
    """The rows of all texts with their coordinates; keys of padding are NaN."""
    coordinates: dict[str, object] = {"batch": np.arange(len(totals)), "total": ("batch", totals)}
    if unit == "component":
        coordinates["component"], dims = names, ("batch", "component")
    else:
        coordinates |= {"layer": model.layers, "head": np.arange(model.n_heads)}
        dims = ("batch", "layer", "head")
    if unit == "source":
        dims, values = (*dims, "key"), texts.empty(model.n_layers, model.n_heads)
        for n, row in rows.items():
            values[n][..., texts.keys.valid[n]] = row
        coordinates["key_token"] = (("batch", "key"), np.array(texts.keys.strings))
    else:
        values = torch.stack([rows[n] for n in range(len(rows))])
    attrs = {"unit_of": unit, "soft_cap": soft_cap(model)}  # the attribute `unit` is the unit of measure
    return xr.DataArray(
        values.numpy(), dims=dims, coords=coordinates, name="direct_logit_attribution", attrs=attrs
    )
