"""All terms of the residual stream, as vectors.

The stream at a layer is the embedding plus what all earlier modules added: heads, attention biases, MLPs, and mixers
that have no attention map (linear attention, state spaces, convolutions), in blocks without attention too. A norm on a
module's output (Gemma 2) is applied to its term; for heads it keeps its scale of the run. In every block the sum is
held to the model's own stream. A model whose stream is no such sum (norms after the addition, as in BERT) is refused.
The stream is that of the model's part: of a tower of images, of an encoder, of a decoder, to which its own heads and
those of its cross-attention write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from headwater.analyses._prompts.examples import Batch, output_in
from headwater.analyses._streams.component_graph import EMBED
from headwater.analyses._streams.ending import Ending, ending, ends, unembedding
from headwater.analyses._streams.frozen_norm import Norm
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.attention.module_hooks import first_output
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks, norms
from headwater.lens.models.classes import logits_of
from headwater.lens.models.closeness import COARSE, close_or_refuse, of_sums, rounding_mend
from headwater.lens.models.signature import compares
from headwater.lens.models.stack import StackBlock
from headwater.lens.models.weights import head_weights
from headwater.lens.running import output_gates
from headwater.lens.running.forward import forward
from headwater.lens.running.watching import Call, Heads, watching

# allowed relative difference between the stream and its sum, in float32 and float64, and in lower precision
STREAM, STREAM_COARSE = 1e-4, 3e-2


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a run, in float64: map, values [batch, kv head, key, d], and W_O [head, d, d_model].

    `result` [batch, position, head, d_model] is the output of each head. `bias`, `mixer`, `mlp` and `entering` [batch,
    position, d_model] are the output bias, the outputs of mixers and of MLPs in the block, and the stream before it.
    `behind` is the norm or the scale on the attention's output, `gate` [batch, head, position, d or 1] an output gate.
    """

    map: AttentionMap
    value: Tensor
    output: Tensor
    entering: Tensor
    result: Tensor
    bias: Tensor
    mixer: Tensor
    mlp: Tensor
    behind: Norm | None
    gate: Tensor | None

    def gated(self, position: int) -> Tensor:
        """W_O behind the output gate of a query: [batch or 1, head, d, d_model]."""
        return self.output[None] if self.gate is None else self.gate[:, :, position, :, None] * self.output

    def written(self, vectors: Tensor, position: int) -> Tensor:
        """The terms that outputs of W_O [batch, …, d_model] add to the stream at a position."""
        return vectors if self.behind is None else self.behind.at(position).divided(vectors)


@dataclass(frozen=True, eq=False)
class Writers:
    """A run of examples of one length: `layers` by number, `terms` of every block by layer number, `embedded` the
    stream before the first block, `last` the stream after the last one.

    `logits` are those of tokens or classes, in two towers the similarities [row], and `embeds` their embeddings, each
    [row, d]. `calls` are those of modules behind the blocks. With a `place` all but `last` are of that position alone,
    as position 0.
    """

    model: HookedModel
    layers: dict[int, Layer]
    terms: dict[int, dict[str, Tensor]]
    embedded: Tensor
    last: Tensor
    logits: Tensor
    embeds: tuple[Tensor, ...]
    calls: list[Call]

    @classmethod
    def of(cls, model: HookedModel, batch: Batch, place: int | None = None) -> Writers:
        kept = slice(None) if place is None else slice(place, place + 1)
        views = [model, *map(model.part, model.beside)]
        heads, blocks_of = (
            list(map(Heads, views)), {b.layer: model.hf.get_submodule(b.path) for b in model.stack}
        )  # fmt: skip
        inside = (m for block in model.stack for m in _watched(model, block))
        gates = (m for view in views for layer in view.layers for m in output_gates.modules_of(view, layer))
        outside = [] if unembedding(model) is not None else ends(model)
        watched = dict.fromkeys([*blocks_of.values(), *inside, *gates, *outside])
        with watching(watched) as calls, contextlib.ExitStack() as stack:
            for each in heads:
                stack.enter_context(context.listening(each))
            out = forward(model, model.to_tokens(batch.ids))
        seen = {call.module: call for call in calls}
        layers: dict[int, Layer] = {}
        terms: dict[int, dict[str, Tensor]] = {}
        for block in model.stack:
            call, own = seen[blocks_of[block.layer]], _own(model, block, seen)
            entering = call.given.double()[:, kept]
            read = [(view, of) for view, of in zip(views, heads, strict=True) if block.layer in of.layers]
            added = [
                _added(model, block, blocks.block(view, block.layer).attention_out, seen) for view, _ in read
            ]
            _hold(model, block, call, [*(output for output, _ in added), *own.values()])
            own = {name: term[:, kept] for name, term in own.items()}
            by_head: dict[str, Tensor] = {}
            for (view, of), (output, scale) in zip(read, added, strict=True):
                layer = _layer(view, block.layer, entering, output[:, kept], scale, of, calls, own, kept)
                start = "" if view is model else f"{view.part_name}."
                for head, result in enumerate(layer.result.unbind(2)):
                    by_head[f"{start}{block.layer}.{head}"] = result
                by_head[f"{start}bias.{block.layer}"] = layer.bias
                if view is model:
                    layers[block.layer] = layer
            terms[block.layer] = by_head | own
        first, last = (seen[blocks_of[model.stack[n].layer]] for n in (0, -1))
        behind = [call for call in calls if call.module in set(outside)]
        return cls(
            model, layers, terms, first.given.double()[:, kept], last.output.double(), *_outputs(model, out), behind
        )  # fmt: skip

    @cached_property
    def end(self) -> Ending:
        """How the stream ends; AnalysisError where that is not known."""
        return ending(self.model, self.last, self.logits, self.calls)

    def at(self, position: int) -> Tensor:
        """The position [row] of the stream that is read: the asked one, or the only one that the outputs have."""
        return self.end.at(self.model, self.last, position)

    def parts(self, before: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, vectors [batch, position, d_model]) of the terms before a layer: "embed", "0.0" …, "bias.0",
        "cross.0.0" … (heads of the other attention in a decoder's blocks), "mixer.0", "mlp.0" …; their sum is the
        stream there.
        """
        yield EMBED, self.embedded
        for number, own in self.terms.items():
            if before is not None and number >= before:
                return
            yield from own.items()


def _outputs(model: HookedModel, out: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`logits` and `embeds` of a run, from the output object of transformers."""
    if compares(model.hf):
        sides = (getattr(out, f"{name}_embeds", None) for name in ("text", "image", "audio"))
        embeds = [side.detach().double() for side in sides if isinstance(side, Tensor)]
        return output_in(model, out).detach().double(), tuple(embeds)
    logits = logits_of(out) if model.has_lm_head or model.classes else None
    return torch.empty(0) if logits is None else logits.detach().double(), ()


def _watched(model: HookedModel, block: StackBlock) -> Iterator[nn.Module]:
    """The modules of a block whose outputs may be added to the stream: those of its steps, and norms behind them."""
    yield from model.hf.get_submodule(block.path).children()
    for step in block.steps:
        yield model.hf.get_submodule(step.path)


def _own(model: HookedModel, block: StackBlock, seen: Mapping[nn.Module, Call]) -> dict[str, Tensor]:
    """What the mixers and MLPs of a block add to the stream: {"mixer.3": [batch, position, d_model], "mlp.3": …}."""
    stream = seen[model.hf.get_submodule(block.path)].given
    found: dict[str, Tensor] = {}
    for step in block.beside:
        module, name = model.hf.get_submodule(step.path), f"{step.kind}.{block.layer}"
        output = seen[module].output
        behind = [
            call.output
            for child in model.hf.get_submodule(block.path).children()
            if child is not module and (call := seen.get(child)) is not None and _same(call, output)
        ]
        term = (behind[0] if behind else output).double()
        if term.numel() == stream.numel():
            found[name] = found.get(name, 0) + term.reshape(stream.shape)
    return found


def _added(
    model: HookedModel, block: StackBlock, module: nn.Module, seen: Mapping[nn.Module, Call]
) -> tuple[Tensor, Tensor | None]:
    """What a block adds of an attention's output, and the scale of each feature in between (LayerScale in DINOv2), None
    for none."""
    output = seen[module].output
    for child in model.hf.get_submodule(block.path).children():
        call = seen.get(child)
        if child is module or call is None or not _same(call, output):
            continue
        if any(weight.dim() > 1 for weight in child.parameters()) or call.output.shape != output.shape:
            continue
        with torch.no_grad():
            scale = first_output(child(torch.ones_like(output[:1, :1])))[0, 0]
        if not bool((scale == 1).all()) and torch.allclose(scale * output, call.output, rtol=1e-5, atol=1e-7):
            return call.output.double(), scale.double()
    return output.double(), None


def _same(call: Call, output: Tensor) -> bool:
    """Whether a module was given an output as it is, and no other stream to add it to."""
    given = [
        x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor) and x.shape == output.shape
    ]
    return len(given) == 1 and torch.equal(given[0], output)


def _hold(model: HookedModel, block: StackBlock, call: Call, written: list[Tensor]) -> None:
    """AnalysisError unless a block adds to the stream what its modules wrote, and nothing else."""
    allowed = STREAM if torch.finfo(model.dtype).eps < COARSE else STREAM_COARSE
    close_or_refuse(
        call.given.double() + sum(written), call.output.double(),
        f"the stream of {model.name} is no sum of what its parts add: block {block.layer} gives something else",
        f", as where a norm stands behind the sum or a part is scaled{rounding_mend(model)}", allowed=allowed,
    )  # fmt: skip


def _layer(
    model: HookedModel, number: int, entering: Tensor, added: Tensor, scale: Tensor | None, heads: Heads,
    calls: Sequence[Call], own: Mapping[str, Tensor], kept: slice,
) -> Layer:  # fmt: skip
    map, value, z = heads.layers[number]
    gate = output_gates.output_gate(model, number, calls, z)
    gate, z = None if gate is None else gate.detach().double()[:, :, kept], z[:, :, kept]
    z = z.detach().double() if gate is None else z.detach().double() * gate
    weights, block = head_weights(model, number), blocks.block(model, number)
    output, bias = weights.W_O.double(), weights.b_O.double()
    result = torch.einsum("bhse,hed->bshd", z, output)
    raw = result.sum(2) + bias
    bias = bias.expand_as(added)
    behind = None
    if block.attention_out is not block.attention:
        behind = Norm.of(block.attention_out, raw)
        constant = norms.norm_bias(block.attention_out, raw.shape[-1]).to(raw)
        result, bias = behind.divided(result), behind.divided(bias) + constant
    elif scale is not None:
        behind = Norm(scale, False, torch.ones(raw.shape[:2]).to(raw))
        result, bias = behind.divided(result), behind.divided(bias)
    what = f"what the heads of layer {number} of {model.name} write does not add up to its attention's output"
    close_or_refuse(result.sum(2) + bias, added, what, rounding_mend(model), allowed=of_sums(model))
    mixer, mlp = (own.get(f"{kind}.{number}", torch.zeros_like(entering)) for kind in ("mixer", "mlp"))
    return Layer(map, value.double(), output, entering, result, bias, mixer, mlp, behind, gate)
