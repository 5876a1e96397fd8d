"""Vectors and logits at the one position where a task's answer is predicted, and the two halves of its texts.

Duplicate texts are no independent samples, so each text is read once. One half of the texts serves to choose or fit,
the other half to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._measures.measure import Answer, Explained
from headwater.analyses._prompts.examples import Batch
from headwater.analyses._streams.ending import at
from headwater.analyses._streams.readout import Readout
from headwater.analyses._streams.writers import Writers
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import norms
from headwater.lens.models.token_ids import class_id, token_id
from headwater.lens.naming.tokens import Tokens
from headwater.lens.transformer_lens import names

MEAN, WRONG = "ic", "ic-iw"  # the paper's names: the answer's logit less the mean of all, less the wrong one


def refuse_without_logits(model: HookedModel) -> None:
    """AnalysisError for a model that gives no logits of tokens or classes."""
    if not model.has_lm_head and not model.classes:
        raise AnalysisError(
            f"{model.name} gives no logits of tokens or classes, so it predicts nothing that a part could speak for"
        )


def once(batches: Sequence[Batch]) -> list[Batch]:
    """The batches without repeated texts."""
    first: dict[tuple[int, ...], int] = {}
    found = []
    for batch in batches:
        rows = zip(batch.places, _inputs(batch), strict=True)
        if kept := [n for n, (place, ids) in enumerate(rows) if first.setdefault(tuple(ids), place) == place]:
            found.append(Batch(batch.rows(kept), [batch.places[n] for n in kept]))
    return found


def _inputs(batch: Batch) -> list[list[int]]:
    """The ids of each text of a batch, and its further inputs."""
    more = batch.ids.more.values() if isinstance(batch.ids, Tokens) else ()
    return torch.cat([batch.ids.as_subclass(torch.Tensor), *(given.flatten(1) for given in more)], 1).tolist()


def tokens_of(model: HookedModel, given: Answer | None, what: str) -> Answer | None:
    """The ids of the answers, so that words are turned into tokens (or classes) once and not per batch."""
    if given is None or isinstance(given, str | int):
        return given
    return [(token_id if model.has_lm_head else class_id)(model, one, what) for one in given]


def answers_of(explained: Explained, run: Writers, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """The answer of each example, a token or a class (none given: what the model predicts), and the wrong one; None
    for both where two towers are compared."""
    if run.logits.dim() == 1:
        return None, None
    right, other = (explained.ids_of(what, batch) for what in ("answer", "wrong"))
    device = run.logits.device
    logits = run.logits if run.logits.dim() == 2 else at(run.logits, run.at(explained.position))
    asked = logits.argmax(-1) if right is None else torch.tensor(right, device=device)
    return asked, None if other is None else torch.tensor(other, device=device)


def readouts(run: Writers, position: int, answer: Tensor, wrong: Tensor | None) -> Iterator[Readout]:
    """The answer's logit less the mean of all logits ("ic"), and less the wrong token's logit ("ic-iw")."""
    yield less_the_mean(run, position, Readout.of(run, position, answer, None))
    if wrong is not None:
        yield Readout.of(run, position, answer, wrong)


def less_the_mean(run: Writers, position: int, single: Readout) -> Readout:
    """A readout of one token's logit less the mean of all logits before a soft cap. No softmax sees that mean."""
    mean, own = run.end.weight.mean(0), run.end.bias
    bias = mean @ norms.norm_bias(run.end.norm, len(mean)).to(mean)
    bias = bias if own is None else bias + own.mean()
    found = replace(single, direction=single.direction - mean, bias=single.bias - bias)
    return replace(found, total=found.shares(at(run.last, run.at(position))) + found.bias)


def along(readout: Readout) -> Tensor:
    """The vectors u [batch, d_model] that read the logit: a part v of the stream adds `u·v` to it."""
    norm = readout.norm
    found = norm.gain * readout.direction
    found = found - found.mean(-1, keepdim=True) if norm.centred else found
    return found / norm.deviation[:, None]


def reads_own_heads(model: HookedModel, layer: int) -> bool:
    """Whether the MLP reads the stream after its layer's attention; in parallel blocks both read the layer's input."""
    return f"blocks.{layer}.hook_resid_mid" in names.places(model)


def halves(groups: Sequence[object], seed: int) -> np.ndarray:
    """Which texts are in the second half, bool [text]: about half of them; texts of one group stay together."""
    known = list(dict.fromkeys(groups))
    if len(known) < 2:
        raise AnalysisError(
            f"{len(groups)} texts are of one kind and can not be put into two halves; give two or more"
        )
    order = np.random.default_rng(seed).permutation(len(known))
    counts = np.array([sum(group == one for group in groups) for one in known])
    before = counts[order].cumsum() - counts[order]
    second = {known[n] for n, start in zip(order, before, strict=True) if 2 * start >= len(groups)}
    second = second or {known[order[-1]]}
    return np.array([group in second for group in groups])
