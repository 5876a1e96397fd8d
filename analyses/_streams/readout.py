"""The end of a stream as a direction in it: final norm and unembedding, a class, or the other tower's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._streams.ending import at
from headwater.analyses._streams.frozen_norm import Norm
from headwater.analyses._streams.writers import Writers
from headwater.lens.model import HookedModel
from headwater.lens.models import norms
from headwater.lens.models.closeness import close_or_refuse, of_sums


@dataclass(frozen=True, eq=False)
class Readout:
    """The final norm with fixed scale at one position, and `direction`: the unembedding of the answer minus the wrong
    one. Of two towers it is the other tower's embedding through the projection, over both lengths of the run.

    `total` [batch] is the difference of the logits before a soft cap, or the similarity; `bias` [batch] the part that
    biases contribute.
    """

    norm: Norm
    direction: Tensor
    total: Tensor
    bias: Tensor

    @classmethod
    def of(cls, run: Writers, position: int, answer: Tensor | None, wrong: Tensor | None) -> Readout:
        """`answer` and `wrong` [batch] are tokens or classes; None for both in two towers."""
        places = run.at(position)
        end, stream = run.end, at(run.last, places)
        found = Norm.of(end.norm, stream)
        constant = norms.norm_bias(end.norm, stream.shape[-1]).to(stream)
        weight, own = end.weight, end.bias
        if answer is None:
            direction = _towards(run) @ weight
            bias = direction @ constant + (0 if own is None else _towards(run) @ own)
            total = (found.divided(stream) * direction).sum(-1) + bias
            refuse_other_logits(run.model, total, run.logits)
            return cls(found, direction, total, bias)
        logits = run.logits if run.logits.dim() == 2 else at(run.logits, places)

        def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
            bias = (weight[tokens] * constant).sum(-1)
            bias = bias if own is None else bias + own[tokens]
            raw = (found.divided(stream) * weight[tokens]).sum(-1) + bias
            refuse_other_logits(run.model, capped(run.model, raw), logits.gather(1, tokens[:, None])[:, 0])
            return raw, bias

        (total, bias), direction = read(answer), weight[answer]
        if wrong is not None:
            (less, other), direction = read(wrong), direction - weight[wrong]
            total, bias = total - less, bias - other
        return cls(found, direction, total, bias)

    def shares(self, vectors: Tensor) -> Tensor:
        """The contributions of vectors [batch, …, d_model] at the position to `total`, [batch, …]."""
        direction = self.direction.reshape(len(vectors), *[1] * (vectors.dim() - 2), -1)
        return (self.norm.divided(vectors) * direction).sum(-1)


def _towards(run: Writers) -> Tensor:
    """The other tower's embeddings at length 1 over the length of this tower's, [row, d]."""
    head = next(call.output.double() for call in run.calls if call.module is run.end.head)
    unit = torch.nn.functional.normalize(head, dim=-1)
    unit = at(unit, run.at(-1)) if unit.dim() == 3 else unit
    length = (at(head, run.at(-1)) if head.dim() == 3 else head).norm(dim=-1, keepdim=True)
    sides = [torch.nn.functional.normalize(side, dim=-1) for side in run.embeds]
    other = max(sides, key=lambda side: float((side - unit).abs().max()))
    return other / length


def soft_cap(model: HookedModel) -> float | None:
    """The soft cap of the model's logits (Gemma 2), or None."""
    return getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)


def capped(model: HookedModel, logits: Tensor) -> Tensor:
    cap = soft_cap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def refuse_other_logits(model: HookedModel, read: Tensor, own: Tensor) -> None:
    """AnalysisError where logits computed from the stream differ from the model's own."""
    what = f"the logits of {model.name} are not its final norm and unembedding of the stream"
    then = ": a scale or a transform is between, so that they can not be read off the stream"
    close_or_refuse(read, own, what, then, allowed=of_sums(model, 2e-3), least=1.0)
