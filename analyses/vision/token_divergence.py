"""Token divergence (T-VHD): which words of an answer depend on the picture, by what heads give without it.

Two runs of each prompt with its answer behind it, one with the picture and one whose image tokens are left out. They
read the same words, so each token is compared in its own context.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.answers import Answered, Answers, answered
from headwater.analyses._prompts.examples import Examples
from headwater.lens.attention import context
from headwater.lens.model import HookedModel
from headwater.lens.models.classes import logits_of
from headwater.lens.models.images import without_images
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress
from headwater.lens.recipes.vhr import head_divergence
from headwater.lens.running.forward import forward
from headwater.lens.running.watching import Heads


@analysis
def token_divergence(
    model: HookedModel,
    examples: Examples,
    answers: Answers = None,
    length: Annotated[int, "tokens of the model's own answer at most, where none is given", Bounds(1)] = 20,
    strongest: Annotated[int, "heads of each layer in the score of a token", Bounds(1)] = 1,
    outliers: Annotated[bool, "keep heads that are outliers of their layer"] = False,
) -> xr.Dataset:
    """`T-VHD_t = Σ_l Σ of the largest D[l, h, t]`, `D = ‖z_lh(y_<t, picture) - z_lh(y_<t)‖₂` where `y_t` is written.

    z is a head's output before `W_O`. D counts as 0 for outliers: where both D and `‖z(without)‖²` exceed the mean of
    the layer's heads by more than their (population) standard deviation. `answers` are the words to read, a text or ids
    for each example or one for all; without them the model's own greedy ones. Dataset over [batch, token], NaN behind
    the end of an answer: `token_score` (T-VHD), `score` [batch, layer, head, token], and `gain`,
    `log p(y_t | y_<t, picture) - log p(y_t | y_<t)`, which says what the picture does to the word itself;
    `token_text` names the words. The paper finds lower T-VHD for hallucinated words.

    Question: Which words of an answer depend on the picture?
    Unit: length of the change of a head's output before the output projection; gain: nats.
    Source: He et al. 2025 (VHD, T-VHD), held to its text; gain is ours.
    Cost: two forward passes per example, and one generation where no answer is given.
    Not for: saying that a word is wrong; comparing models, whose outputs differ in size.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> given = zoo.inputs("llava", lengths=(11, 11))
    >>> prompts = model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])
    >>> found = hw.analyses.token_divergence(model, prompts, answers=[[5, 6, 7], [8]])
    >>> found.token_score.shape, int(found.token_score.isnull().sum())
    ((2, 3), 2)
    """
    batches = answered(model, examples, answers, length)
    rows: dict[int, tuple[Tensor, Tensor, list[str]]] = {}
    for batch in progress(batches, desc="token divergence", unit="text"):
        count = batch.words.shape[1]
        seen, told = _run(model, batch.tokens, count)
        blind, guessed = _run(model, without_images(model, batch.tokens), count)
        divergence, outlier = head_divergence(seen, blind)
        score = divergence if outliers else divergence.masked_fill(outlier, 0.0)
        rows[batch.places[0]] = score, told - guessed, _strings(model, batch)
    longest = max(len(gain) for _, gain, _ in rows.values())
    shape = (len(rows), model.n_layers, model.n_heads, longest)
    score, gain = np.full(shape, np.nan), np.full((len(rows), longest), np.nan)
    texts = np.full((len(rows), longest), "", dtype=object)
    for place, (each, more, words) in rows.items():
        score[place, ..., : len(more)] = each.permute(1, 2, 0).numpy()
        gain[place, : len(more)], texts[place, : len(more)] = more.numpy(), words
    top = np.sort(score, axis=2)[:, :, -min(strongest, model.n_heads) :].sum((1, 2))
    return xr.Dataset(
        {
            "token_score": (("batch", "token"), top),
            "score": (("batch", "layer", "head", "token"), score),
            "gain": (("batch", "token"), gain),
        },
        coords={
            "batch": np.arange(len(rows)), "layer": model.layers, "head": np.arange(model.n_heads),
            "token": np.arange(longest), "token_text": (("batch", "token"), texts.astype(str)),
        },
        attrs={"answers": "the model's own" if answers is None else "given"},
    )  # fmt: skip


def _run(model: HookedModel, tokens: Tokens, count: int) -> tuple[Tensor, Tensor]:
    """z [token, layer, head, d] where the last `count` tokens are written, and their log-probabilities, float64."""
    heads = Heads(model)
    with context.listening(heads):
        logits = logits_of(forward(model, tokens))
    assert logits is not None
    z = torch.stack([heads.layers[layer][2][0, :, -count - 1 : -1] for layer in model.layers])
    words = tokens.ids[0, -count:, None].to(logits.device)
    told = logits[0, -count - 1 : -1].double().log_softmax(-1).gather(-1, words)[:, 0]
    return z.permute(2, 0, 1, 3).detach().double().cpu(), told.detach().cpu()


def _strings(model: HookedModel, batch: Answered) -> list[str]:
    return model.to_strings(batch.words[0].tolist())
