"""Logit lens: what would the model predict if it stopped before each layer?

The stream that enters each layer goes through the final norm and the unembedding (nostalgebraist 2020), or the head of
classes, and through the soft cap if the model has one. Behind the last layer this is the model's own prediction, which
is checked. One run. Early streams are not trained to be read like this; what the lens misses may be present in another
basis.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._measures.measure import AnswerSetting, Explained, PositionSetting
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.ending import at, ending, ends, unembedding
from headwater.analyses._streams.readout import capped, refuse_other_logits, soft_cap
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import residual_stream
from headwater.lens.models.signature import compares
from headwater.lens.running.watching import watching


@analysis
def logit_lens(
    model: HookedModel,
    examples: Examples,
    answer: AnswerSetting = None,
    position: PositionSetting = -1,
    top: Annotated[int, "most likely tokens to list", Bounds(1)] = 5,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`W_U·norm(x^l)` at `position`, of a head of classes at the position that it reads, for the stream x that enters
    each layer, and behind the last one (layer "final").

    `logit`, `log_probability` and `rank` (0: the most likely) of the answer, or of the model's prediction, and the
    `entropy` of the distribution, all [batch, layer]; `token` and `token_text` of the most likely tokens, [batch,
    layer, top]. Tokens are classes where a model judges whole examples. A soft cap on the logits is applied. A model
    whose own logits differ from those of its last stream is refused.

    Question: What would the model predict before each layer?
    Unit: logit; log_probability in nats; rank from 0; entropy in nats.
    Source: nostalgebraist 2020, Interpreting GPT: the logit lens (from memory).
    Cost: one forward pass and one unembedding per layer and text.
    Not for: early layers of models that change basis; what a layer causes (patch).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.logit_lens(model, prompt, answer="Mary")
    >>> found["rank"].values[0].tolist()  # before layers 0 to 3, and at the end
    [122, 6, 0, 0, 0]
    """
    explained = Explained(model, None, answer, None, position, "logit", of_classes=True)
    if compares(model.hf):
        raise AnalysisError(
            f"{model.name} tells how alike two examples are and predicts nothing, so there is no lens on it; "
            "direct_logit_attribution takes the similarity apart"
        )
    texts = Texts.of(model, examples, batch_size)
    top = min(top, model.vocab if model.has_lm_head else len(model.classes))
    rows: dict[int, dict[str, Tensor]] = {}
    for batch in texts.batches:
        place_of(position, texts.length(batch), f"example {batch.places[0]}")
        logits = _lensed(model, batch, position)
        given = explained.ids_of("answer", batch)
        asked = logits[:, -1].argmax(-1) if given is None else torch.tensor(given, device=logits.device)
        found = _read(logits, asked, top)
        for row, place in enumerate(batch.places):
            rows[place] = {name: values[row].cpu() for name, values in found.items()}
    values = {name: torch.stack([rows[n][name] for n in sorted(rows)]).numpy() for name in rows[0]}
    tokens = values["token"]
    names = model.to_strings if model.has_lm_head else lambda ids: [model.classes[n] for n in ids]
    words = np.array(names(tokens.ravel().tolist())).reshape(tokens.shape)
    each = {name: (("batch", "layer"), values[name]) for name in values if name != "token"}
    return xr.Dataset(
        each | {"token": (("batch", "layer", "top"), tokens), "token_text": (("batch", "layer", "top"), words)},
        coords={
            "batch": np.arange(len(rows)), "layer": [*map(str, model.layers), "final"], "top": np.arange(top),
        },
        attrs={"soft_cap": soft_cap(model)},
    )  # fmt: skip


def _lensed(model: HookedModel, batch: Batch, position: int) -> Tensor:
    """Logits [batch, layer and final, vocab] in float64."""
    streams: dict[int | str, Tensor] = {}
    outside = [] if unembedding(model) is not None else ends(model)
    with (
        watching(outside) as calls,
        residual_stream.listening(model, lambda place, stream: streams.update({place: stream.detach()})),
    ):
        own = model(batch.ids)
    end = ending(model, streams["final"], own, calls)
    places = end.at(model, streams["final"], position)
    found = end.read(torch.stack([at(streams[place], places) for place in (*model.layers, "final")], 1))
    found = capped(model, found)
    refuse_other_logits(model, found[:, -1], own if own.dim() == 2 else at(own, places))
    return found.double()


def _read(logits: Tensor, asked: Tensor, top: int) -> dict[str, Tensor]:
    logs = logits.log_softmax(-1)
    place = asked[:, None, None].expand(-1, logits.shape[1], 1)
    chosen = logits.gather(-1, place)
    return {
        "logit": chosen[..., 0],
        "log_probability": logs.gather(-1, place)[..., 0],
        "rank": (logits > chosen).sum(-1),
        "entropy": -(logs.exp() * logs).nan_to_num().sum(-1),
        "token": logits.topk(top, -1).indices,
    }
