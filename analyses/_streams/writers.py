"""Everything that writes to the residual stream, as vectors, and what reads a number off its end.

The stream at a layer is the embedding plus what every head, attention bias and MLP before it added; a norm on the
attention's output (Gemma 2) is taken as the division it was in the run. The sums are held to what the model computed,
and a model whose stream is no such sum (norms behind the sum, as in BERT) is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch
from headwater.analyses._streams.attention_terms import Norm
from headwater.analyses._streams.rounding import in_half
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks
from headwater.lens.models.weights import head_weights
from headwater.lens.running.watching import Heads
from headwater.lens.transformer_lens import names as transformer_lens_names
from headwater.lens.transformer_lens.run import Run

EMBED = "embed"


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a run, in float64: map, values [batch, kv head, key, d], and W_O [head, d, d_model].

    `result` [batch, position, head, d_model] is what each head adds, `bias` [batch, position, d_model] what
    the output's bias does, `mlp` the MLP, `entering` the stream before all; `behind` the norm behind the attention.
    """

    map: AttentionMap
    value: Tensor
    output: Tensor
    entering: Tensor
    result: Tensor
    bias: Tensor
    mlp: Tensor
    behind: Norm | None

    def written(self, vectors: Tensor) -> Tensor:
        """What vectors [batch, position, …, d_model] behind W_O come to in the stream."""
        if self.behind is None:
            return vectors
        deviation = self.behind.deviation
        return self.behind.linear(vectors) / deviation.reshape(*deviation.shape, *[1] * (vectors.dim() - 2))


@dataclass(frozen=True, eq=False)
class Writers:
    """A run of texts of one length: `layers` by number, `last` the stream behind the last, `logits`."""

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
        """(name, vectors [batch, position, d_model]) of all that is added before a layer: "embed", "0.0" …, "bias.0",
        "mlp.0" …; their sum is the stream there."""
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
        result = behind.linear(result) / behind.deviation[..., None, None]
        bias = behind.linear(bias) / behind.deviation[..., None] + constant
    rest = added - result.sum(2) - bias
    if rest.norm() > 1e-3 * added.norm() + 1e-6:
        raise AnalysisError(
            f"what the heads of layer {number} of {model.name} write does not add up to its attention's output"
            f"{in_half(model)}"
        )
    return Layer(
        map, value.double(), output, kept[f"{start}hook_resid_pre"], result, bias, kept[f"{start}hook_mlp_out"], behind
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Readout:
    """The final norm, its scale frozen, and the unembedding of an answer less that of a wrong one, at one position.

    `total` [batch] is the difference of the logits before a soft cap, `bias` [batch] the share of biases in it.
    """

    norm: Norm
    direction: Tensor
    total: Tensor
    bias: Tensor

    @classmethod
    def of(cls, run: Writers, position: int, answer: Tensor, wrong: Tensor | None) -> Readout:
        model, head = run.model, run.model.hf.get_output_embeddings()
        norm = blocks.final_norm(model.hf)
        if head is None or norm is None:
            raise AnalysisError(f"{model.name} has no final norm and unembedding that are known")
        stream = run.last[:, position]
        found = Norm.of(norm, stream)
        constant = blocks.norm_bias(norm, stream.shape[-1]).to(stream)
        weight, own = head.weight.detach().double(), getattr(head, "bias", None)

        def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
            bias = (weight[tokens] * constant).sum(-1)
            bias = bias if own is None else bias + own.detach().double()[tokens]
            raw = (found.linear(stream) * weight[tokens]).sum(-1) / found.deviation + bias
            _check(run, position, tokens, raw)
            return raw, bias

        (total, bias), direction = read(answer), weight[answer]
        if wrong is not None:
            (less, other), direction = read(wrong), direction - weight[wrong]
            total, bias = total - less, bias - other
        return cls(found, direction, total, bias)

    def shares(self, vectors: Tensor) -> Tensor:
        """What vectors [batch, …, d_model] at the position give to the difference, [batch, …]."""
        middle = [1] * (vectors.dim() - 2)
        direction = self.direction.reshape(len(vectors), *middle, -1)
        return (self.norm.linear(vectors) * direction).sum(-1) / self.norm.deviation.reshape(-1, *middle)


def soft_cap(model: HookedModel) -> float | None:
    """What bounds the model's logits (Gemma 2), None where nothing does."""
    return getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)


def _check(run: Writers, position: int, tokens: Tensor, raw: Tensor) -> None:
    cap = soft_cap(run.model)
    expected = raw if cap is None else cap * torch.tanh(raw / cap)
    seen = run.logits[:, position].gather(1, tokens[:, None])[:, 0]
    if not torch.allclose(expected, seen, atol=2e-3, rtol=2e-3):
        raise AnalysisError(
            f"the logits of {run.model.name} are not its final norm and unembedding of the stream (a scale or a "
            "transform is between), so they do not fall apart into parts"
        )
