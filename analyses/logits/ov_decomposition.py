"""What a head moves along a direction, by the token it looks at and by the part that wrote into that token's stream.

The direction reads a logit, or is any direction of the residual stream (of a probe, a steering vector). The value and
output maps of Elhage et al. 2021 are used with the scales of both norms frozen and the weights of the run. The terms
add up to what the head writes along the direction; for a logit that is its direct logit attribution. One run. Why the
head has these weights is a question for qk_decomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._measures.measure import AnswerSetting, Explained, PositionSetting, WrongSetting
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.head_inputs import Reading, one_head, refuse_other_sum
from headwater.analyses._streams.readout import Readout, soft_cap
from headwater.analyses._streams.writers import Writers
from headwater.analyses.logits._answer_position import answers_of
from headwater.analyses.logits._directions import Direction, direction_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import head_weights
from headwater.lens.naming.heads import Head


@analysis
def ov_decomposition(
    model: HookedModel,
    examples: Examples,
    head: Annotated[str | Head, "the head, as 5.1"] = "0.0",
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    direction: Annotated[
        Direction | None, "read along this, not a logit: d_model numbers, or their .npy file"
    ] = None,
    behind_norm: Annotated[bool, "read the direction behind the final norm, as a logit is"] = False,
    position: PositionSetting = -1,
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """`A_ij · (c W_V W_O)·u` [batch, key, component] for every key j and every part c of its stream, i at `position`.

    u reads the logit of the answer (less that of a wrong one) off the stream, with the scales of the final norm and of
    the norm in front of the attention as in the run. With `direction`, u is that vector itself, as a probe of the
    stream reads it, times its own length. With `behind_norm` the direction is read behind the final norm, so that
    `W_U[answer] - W_U[wrong]` gives the result of the two tokens. Parts are "embed", heads, "bias.l" and "mlp.l" of the
    layers before, and "bias" (of the norm in front and of W_V). The sum over keys and parts is what the head writes
    along u, for a logit its share in `direct_logit_attribution`: the coordinate `total` [batch].

    Question: What does a head move into a logit or a direction: from which token, and written there by whom?
    Unit: logit (before a soft cap on logits); with a direction, length along it.
    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (from memory); algebra held to dense
    runs.
    Cost: one forward pass, and one product per key and part.
    Not for: what the head does through later layers; models whose norms stand behind the sum (refused).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.ov_decomposition(model, prompt, head="2.0", answer="Mary", wrong="John")
    >>> found.shape, found.key_token.values[0, found[0].sum("component").values.argmax()].item()
    ((1, 15, 22), 'Mary')
    """
    wanted = one_head(model, head)
    if direction is not None and (answer is not None or wrong is not None):
        raise AnalysisError("direction and answer ask for different things; give one of them")
    if behind_norm and direction is None:
        raise AnalysisError(
            "behind_norm is about a direction; give one, or leave it out: a logit is read so anyway"
        )
    along = None if direction is None else direction_of(model, direction)
    plain = along is not None and not behind_norm
    explained = None if plain else Explained(model, None, answer, wrong, position, "logit", of_classes=True)
    texts = Texts.of(model, examples, batch_size)
    rows: dict[int, Tensor] = {}
    totals = torch.zeros(len(texts.valid), dtype=torch.float64)
    names: list[str] = []
    for batch in texts.batches:
        place = place_of(position, texts.length(batch), f"example {batch.places[0]}")
        run = Writers.of(model, batch)
        read = _reader(explained, run, batch, position, along)
        places = torch.full((len(run.last),), place) if explained is None else run.at(position).cpu()
        reading = Reading.of(run, wanted.layer)
        names = reading.names
        terms, total = _terms(run, reading, read, wanted, places)
        totals[batch.places] = total.cpu()
        rows |= dict(zip(batch.places, terms.cpu(), strict=True))
    values = texts.empty(len(names))
    for n, row in rows.items():
        values[n][:, texts.keys.valid[n]] = row.T
    return xr.DataArray(
        values.movedim(1, 2).numpy(),
        dims=("batch", "key", "component"),
        coords={
            "batch": np.arange(len(totals)), "component": names, "total": ("batch", totals),
            "key_token": (("batch", "key"), np.array(texts.keys.strings)),
        },
        name="ov_decomposition",
        attrs={
            "head": str(wanted), "soft_cap": soft_cap(model),
            "direction": None if along is None else along.tolist(),
        },
    )  # fmt: skip


def _reader(
    explained: Explained | None, run: Writers, batch: Batch, position: int, along: Tensor | None
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """`vectors·u` [batch, …]: u reads a logit through the final norm, or the direction, through that norm or not."""
    if explained is None:
        assert along is not None
        return lambda vectors: vectors @ along.to(vectors)
    found = Readout.of(run, position, *answers_of(explained, run, batch))
    if along is not None:
        found = replace(found, direction=along.to(found.direction).expand_as(found.direction))
    return found.shares


def _terms(
    run: Writers, reading: Reading, read: Callable[[Tensor], Tensor], head: Head, places: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[batch, key, component], and the head's share [batch], at one position of each row."""
    asked = places.unique().tolist()
    terms, total = _at(run, reading, read, head, asked[0])
    for place in asked[1:]:
        here, (more, other) = (places == place).to(total.device), _at(run, reading, read, head, place)
        terms, total = torch.where(here[:, None, None], more, terms), torch.where(here, other, total)
    return terms, total


def _at(
    run: Writers, reading: Reading, read: Callable[[Tensor], Tensor], head: Head, at: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[batch, key, component], and the head's share [batch], at a position."""
    model, layer = run.model, run.layers[head.layer]
    weights = head_weights(model, head.layer)
    shape = model.shape(head.layer)
    shared = head.head // (shape.heads // shape.kv)
    written = layer.written(layer.gated(at)[:, head.head].expand(layer.map.shape[0], -1, -1), at)
    values = reading.through(weights.W_V[shared], weights.b_V[shared])
    given = torch.einsum("bkce,be->bkc", values, read(written))
    looked = layer.map.tile(slice(at, at + 1), slice(None))[:, head.head, 0].double()
    terms = looked[..., None] * given
    total = read(layer.result[:, at, head.head])
    refuse_other_sum(model, terms.sum((1, 2)), total, f"what head {head} of {model.name} moves")
    return terms, total
