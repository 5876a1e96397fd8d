"""All terms of the residual stream, as vectors.

The stream at a layer is the embedding plus the outputs of all earlier heads, attention biases and MLPs. A norm on the
attention's output (Gemma 2) is applied to each term with its scale of the run. The sums are compared with the model's
own values. A model whose stream is no such sum (norms after the addition, as in BERT) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch
from headwater.analyses._streams.component_graph import EMBED
from headwater.analyses._streams.frozen_norm import Norm
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks
from headwater.lens.models.closeness import close_or_refuse, rounding_mend
from headwater.lens.models.weights import head_weights
from headwater.lens.running.watching import Heads
from headwater.lens.transformer_lens import names as transformer_lens_names
from headwater.lens.transformer_lens.run import Run


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a run, in float64: map, values [batch, kv head, key, d], and W_O [head, d, d_model].

    `result` [batch, position, head, d_model] is the output of each head. `bias`, `mlp` and `entering` [batch, position,
    d_model] are the output bias, the output of the MLP and the stream before the layer. `behind` is the norm on the
    attention's output.
    """

    map: AttentionMap
    value: Tensor
    output: Tensor
    entering: Tensor
    result: Tensor
    bias: Tensor
    mlp: Tensor
    behind: Norm | None

    def written(self, vectors: Tensor, position: int) -> Tensor:
        """The terms that outputs of W_O [batch, …, d_model] add to the stream at a position."""
        return vectors if self.behind is None else self.behind.at(position).divided(vectors)


@dataclass(frozen=True, eq=False)
class Writers:
    """A run of texts of one length: `layers` by number, `last` the stream after the last layer, `logits`."""

    model: HookedModel
    layers: dict[int, Layer]
    last: Tensor
    logits: Tensor

    @classmethod
    def of(cls, model: HookedModel, batch: Batch) -> Writers:
        known = transformer_lens_names.places(model)
        names = [f"blocks.{layer}.hook_{what}" for layer in model.layers for what in ("attn_out", "mlp_out")]
        if missing := [name for name in names if name not in known]:
            raise AnalysisError(
                f"the stream of {model.name} is no sum of what its parts add ({missing[0]} is not added to it, as "
                "where a norm stands behind the sum), so logits do not fall apart into parts"
            )
        names += [f"blocks.{layer}.hook_resid_pre" for layer in model.layers]
        final = f"blocks.{model.layers[-1]}.hook_resid_post"
        names += [final, *(f"blocks.{layer}.attn.hook_z" for layer in model.layers)]
        run = Run(model, [known[name] for name in names], len(batch.ids), keep=names)
        heads = Heads(model)
        with run.on(), context.listening(heads):
            logits = model(batch.ids)
        kept = {name: tensor.double() for name, tensor in run.cache.items()}
        layers = {layer: _layer(model, layer, kept, heads) for layer in model.layers}
        return cls(model, layers, kept[final], logits.double())

    def parts(self, before: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, vectors [batch, position, d_model]) of the terms before a layer: "embed", "0.0" …, "bias.0", "mlp.0"
        …; their sum is the stream there.
        """
        yield EMBED, self.layers[self.model.layers[0]].entering
        for number, layer in self.layers.items():
            if before is not None and number >= before:
                return
            for head in range(self.model.n_heads):
                yield f"{number}.{head}", layer.result[:, :, head]
            yield f"bias.{number}", layer.bias
            yield f"mlp.{number}", layer.mlp


def _layer(model: HookedModel, number: int, kept: dict[str, Tensor], heads: Heads) -> Layer:
    map, value, _ = heads.layers[number]
    weights, block = head_weights(model, number), blocks.block(model, number)
    start = f"blocks.{number}."
    z, added = kept[f"{start}attn.hook_z"], kept[f"{start}hook_attn_out"]
    output, bias = weights.W_O.double(), weights.b_O.double()
    result = torch.einsum("bshe,hed->bshd", z, output)
    raw = result.sum(2) + bias
    bias = bias.expand_as(added)
    behind = None
    if block.attention_out is not block.attention:
        behind = Norm.of(block.attention_out, raw)
        constant = blocks.norm_bias(block.attention_out, raw.shape[-1]).to(raw)
        result, bias = behind.divided(result), behind.divided(bias) + constant
    what = f"what the heads of layer {number} of {model.name} write does not add up to its attention's output"
    close_or_refuse(result.sum(2) + bias, added, what, rounding_mend(model))
    return Layer(
        map, value.double(), output, kept[f"{start}hook_resid_pre"], result, bias, kept[f"{start}hook_mlp_out"], behind
    )  # fmt: skip
