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
from headwater.analyses._streams.readout import Readout, unembedding
from headwater.analyses._streams.writers import Writers
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import norms
from headwater.lens.models.linear import linear
from headwater.lens.models.token_ids import token_id
from headwater.lens.naming.tokens import Tokens
from headwater.lens.transformer_lens import names

MEAN, WRONG = "ic", "ic-iw"  # the paper's names: the answer's logit less the mean of all, less the wrong one


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
    """The ids of the answers, so that words are turned into tokens once and not per batch."""
    if given is None or isinstance(given, str | int):
        return given
    return [token_id(model, one, what) for one in given]


def answers_of(explained: Explained, run: Writers, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Token ids of the answer of each text (none given: what the model predicts), and of the wrong one."""
    right, other = (explained.ids_of(what, batch) for what in ("answer", "wrong"))
    device = run.logits.device
    asked = (
        run.logits[:, explained.position].argmax(-1) if right is None else torch.tensor(right, device=device)
    )
    return asked, None if other is None else torch.tensor(other, device=device)


def readouts(run: Writers, position: int, answer: Tensor, wrong: Tensor | None) -> Iterator[Readout]:
    """The answer's logit less the mean of all logits ("ic"), and less the wrong token's logit ("ic-iw")."""
    yield less_the_mean(run, position, Readout.of(run, position, answer, None))
    if wrong is not None:
        yield Readout.of(run, position, answer, wrong)


def less_the_mean(run: Writers, position: int, single: Readout) -> Readout:
    """A readout of one token's logit less the mean of all logits before a soft cap. No softmax sees that mean."""
    norm, head = unembedding(run.model)
    end = linear(head, "the language head")
    mean, own = end.weight.detach().double().mean(1), end.bias
    bias = mean @ norms.norm_bias(norm, len(mean)).to(mean)
    bias = bias if own is None else bias + own.detach().double().mean()
    found = replace(single, direction=single.direction - mean, bias=single.bias - bias)
    return replace(found, total=found.shares(run.last[:, position]) + found.bias)


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
