"""The end of a model as a direction in the residual stream: final norm and unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.analyses._streams.frozen_norm import Norm
from headwater.analyses._streams.writers import Writers
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks, norms
from headwater.lens.models.closeness import close_or_refuse, of_sums
from headwater.lens.models.linear import linear


@dataclass(frozen=True, eq=False)
class Readout:
    """The final norm with fixed scale at one position, and `direction`: the unembedding of the answer minus the wrong
    one.

    `total` [batch] is the difference of the logits before a soft cap, `bias` [batch] the part that biases contribute.
    """

    norm: Norm
    direction: Tensor
    total: Tensor
    bias: Tensor

    @classmethod
    def of(cls, run: Writers, position: int, answer: Tensor, wrong: Tensor | None) -> Readout:
        norm, head = unembedding(run.model)
        stream = run.last[:, position]
        found = Norm.of(norm, stream)
        constant = norms.norm_bias(norm, stream.shape[-1]).to(stream)
        end = linear(head, "the language head")
        weight, own = end.weight.T.detach().double(), end.bias

        def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
            bias = (weight[tokens] * constant).sum(-1)
            bias = bias if own is None else bias + own.detach().double()[tokens]
            raw = (found.divided(stream) * weight[tokens]).sum(-1) + bias
            seen = run.logits[:, position].gather(1, tokens[:, None])[:, 0]
            refuse_other_logits(run.model, capped(run.model, raw), seen)
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


def unembedding(model: HookedModel) -> tuple[nn.Module, Any]:
    """The final norm and the unembedding."""
    norm, head = blocks.final_norm(model), model.hf.get_output_embeddings()
    if norm is None or head is None:
        raise AnalysisError(f"{model.name} has no final norm and unembedding that are known")
    return norm, head


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
