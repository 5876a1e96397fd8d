"""A part of a model as a graph of nodes that write to the residual stream and inputs that read from it, and runs with
changed edges.

Nodes are the embedding, every head and every MLP; in a decoder also the cross-attention of each layer, as one node.
Inputs are the queries, keys and values of each head, the input of each MLP and cross-attention, and "logits": all that
reads the stream behind the last block, which is the language head, a head of classes, or the decoder that reads an
encoder. An input reads the sum of all earlier nodes (and biases). `Passage` runs the model with a separate
stream for every input, so that a single edge can be changed. A norm behind the heads (Gemma 2) keeps the scale that it
has in the run. An output gate (Qwen3-Next) is read where the queries are: it belongs to the input of queries. A
parallel MLP reads the same stream as its attention. The norm in front of an input belongs to the model, not to the
edge. Before anything is computed, a short run in which every edge is kept is held to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.analyses._prompts.examples import outputs_of
from headwater.analyses._streams.between_layers import refuse_mixers
from headwater.analyses._streams.frozen_norm import NormForm, normed_of
from headwater.lens.attention import backward_rules
from headwater.lens.errors import AnalysisError, first_line
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks, norms
from headwater.lens.models.closeness import close_or_refuse, of_sums, rounding_mend
from headwater.lens.models.projections import Projection
from headwater.lens.models.weights import HeadWeights, head_weights
from headwater.lens.running.output_gates import read_gates
from headwater.lens.running.short_input import reads_text_alone, short_input
from headwater.lens.transformer_lens import names as transformer_lens_names
from headwater.lens.transformer_lens.run import Activation, Run

KeyValues = Literal["head", "kv"]
EMBED, LOGITS = "embed", "logits"
CROSS = "cross"  # the part whose heads a decoder's graph holds as one node a layer
LENGTH = 12  # tokens of the run that is held to the model


@dataclass(frozen=True)
class Inputs:
    """Inputs that read the stream at the same place: `names`, numbered from `first`; the first `senders` nodes reach
    them.
    """

    layer: int
    kind: Literal["q", "k", "v", "cross", "mlp", "logits"]
    names: tuple[str, ...]
    first: int
    senders: int

    @property
    def span(self) -> slice:
        return slice(self.first, self.first + len(self.names))


# (inputs, stream [batch, position, d_model], node outputs so far) → a stream for each input [batch, input, position,
# d_model]; (number of the first node, outputs [node, batch, position, d_model]) → new outputs. None changes nothing.
Reads = Callable[[Inputs, Tensor, list[Tensor]], Tensor | None]
Sends = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class _Layer:
    weights: HeadWeights
    block: blocks.TransformerBlock
    behind: NormForm | None
    parallel: bool
    gate: Projection | None
    cross: blocks.TransformerBlock | None


class Wiring:
    """The nodes (`senders`) and inputs (`groups`) of a model, in the order of a run.

    `key_values` under grouped queries: "head" gives each query head its own key and value inputs, "kv" one to all heads
    that share them.
    """

    def __init__(self, model: HookedModel, key_values: KeyValues = "head") -> None:
        _refuse(model)
        self.model = model
        self.shared = model.n_kv_heads != model.n_heads and key_values == "kv"
        self.wide = model.n_kv_heads != model.n_heads and not self.shared
        gates = read_gates(model)
        self.layers = {layer: self._layer(layer, gates[layer]) for layer in model.layers}
        self.senders: list[str] = [EMBED]
        self.groups: list[Inputs] = []
        for layer, found in self.layers.items():
            before = len(self.senders)
            for kind in ("q", "k", "v"):
                self._add(layer, kind, self._names(layer, kind), before)
            self.senders += [f"{layer}.{head}" for head in range(model.n_heads)]
            if found.cross is not None:
                self._add(layer, CROSS, [f"{CROSS}.{layer}"], len(self.senders))
                self.senders.append(f"{CROSS}.{layer}")
            if found.block.mlp_out is not None:
                seen = before if found.parallel else len(self.senders)
                self._add(layer, "mlp", [f"mlp.{layer}"], seen)
                self.senders.append(f"mlp.{layer}")
        self._add(max(model.layers) + 1, "logits", [LOGITS], len(self.senders))
        self.receivers = [name for group in self.groups for name in group.names]
        self.number = {name: place for place, name in enumerate(self.senders)}
        self._hold()
        self._hold_end()

    def _add(self, layer: int, kind: Any, names: list[str], senders: int) -> None:
        first = sum(len(group.names) for group in self.groups)
        self.groups.append(Inputs(layer, kind, tuple(names), first, senders))

    def _names(self, layer: int, kind: str) -> list[str]:
        if kind != "q" and self.shared:
            return [f"{layer}.kv{n}.{kind}" for n in range(self.model.n_kv_heads)]
        return [f"{layer}.{n}.{kind}" for n in range(self.model.n_heads)]

    def _layer(self, layer: int, gate: Projection | None) -> _Layer:
        model, known, start = self.model, transformer_lens_names.places(self.model), f"blocks.{layer}."
        weights = head_weights(model, layer, expand=self.wide)  # refuses layouts that have none per head
        block = blocks.block(model, layer)
        if f"{start}hook_attn_out" not in known:
            raise AnalysisError(
                f"layer {layer} of {model.name} does not add its attention and its MLP to the residual stream as they "
                "are, so its edges are not known"
            )
        separate = known[f"{start}attn.hook_k"].module is not known[f"{start}attn.hook_q"].module
        if self.wide and not separate:
            raise AnalysisError(
                f"{model.name} makes queries and keys in one module, so that query heads can not be given keys of "
                'their own; give key_values="kv"'
            )
        norm = block.attention_out
        behind = None if norm is block.attention else NormForm.of(norm, model.d_model)
        parallel = block.mlp_out is not None and f"{start}hook_resid_mid" not in known
        if block.mlp_out is not None and block.norm2 is None and block.norm1 is not None and not parallel:
            raise AnalysisError(f"what the MLP of layer {layer} of {model.name} reads is not known")
        cross = blocks.block(model.part(CROSS), layer) if CROSS in model.beside else None
        if cross is not None and (cross.norm1 is None or f"{start}hook_other_attn_out" not in known):
            raise AnalysisError(
                f"what the cross-attention of layer {layer} of {model.name} reads is not known"
            )
        return _Layer(weights, block, behind, parallel, gate, cross)

    def _hold(self) -> None:
        """AnalysisError unless nodes add up to what the inputs read, and inputs that read all edges give the model's
        logits. It fails for a norm, a scale or a layer that the graph does not know.
        """
        model = self.model
        ids = _short(model)

        def read(group: Inputs, stream: Tensor, sent: list[Tensor]) -> Tensor:
            added = torch.stack([*sent[: group.senders]]).sum(0)
            added = added + self.constants(group).to(added)
            return added[:, None].expand(-1, len(group.names), -1, -1)

        expected = outputs_of(model)(ids)
        try:
            found, _ = self.run(ids, read)
        except RuntimeError as error:
            way_out = '; give key_values="kv"' if self.wide else ""
            raise AnalysisError(
                f"{model.name} does more to its queries and keys than project them ({first_line(error)}), so "
                f"query heads can not be given keys of their own{way_out}"
            ) from None
        close_or_refuse(
            found, expected, f"nodes and edges of {model.name} do not give its logits when every edge is kept",
            rounding_mend(model)
            or ": something writes to its stream or scales it that the graph does not know, so no edge of it is scored",
            allowed=of_sums(model), least=1.0,
        )  # fmt: skip

    def _hold_end(self) -> None:
        """AnalysisError unless all that follows the blocks reads the stream behind the last one: with that stream held
        fixed, zeros at every other input must not reach the outputs. Features of an earlier block would (LLaVA).
        """

        def end(zeros: bool) -> Tensor:
            def read(group: Inputs, stream: Tensor, sent: list[Tensor]) -> Tensor | None:
                if group.kind != LOGITS and not zeros:
                    return None
                fixed = torch.linspace(-1, 1, stream.shape[-1]).to(stream).expand_as(stream)
                put = fixed if group.kind == LOGITS else torch.zeros_like(stream)
                return put[:, None].expand(-1, len(group.names), -1, -1)

            return self.run(_short(self.model), read)[0]

        what = f"the stream of {self.model.name} is read elsewhere than behind its last block, which no edge shows"
        then = "; use patch, whose cells are replaced wherever they are read"
        close_or_refuse(end(False), end(True), what, then, allowed=of_sums(self.model), least=1.0)

    def constants(self, group: Inputs) -> Tensor:
        """What inputs read beside nodes, the same at every position: the biases of the attention before, [d_model]."""
        found = torch.zeros(())
        for number, layer in self.layers.items():
            serial = number == group.layer and group.kind in (CROSS, "mlp") and not layer.parallel
            if number < group.layer or serial:
                bias = layer.weights.b_O
                own = bias if layer.behind is None else norms.norm_bias(layer.block.attention_out, len(bias))
                found = found.to(own) + own
        return found

    def heads_of(self, receiver: str) -> list[str]:
        """The heads that read through an input of queries, keys or values."""
        layer, head, _ = receiver.split(".")
        if not head.startswith("kv"):
            return [f"{layer}.{head}"]
        size = self.model.n_heads // self.model.n_kv_heads
        first = int(head[2:]) * size
        return [f"{layer}.{n}" for n in range(first, first + size)]

    def edges(self) -> Tensor:
        """Mask of the edges, bool [node, input]."""
        found = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        for group in self.groups:
            found[: group.senders, group.span] = True
        return found

    def run(
        self, ids: Tensor, reads: Reads | None = None, sends: Sends | None = None, *, grad: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """What `outputs_of` gives, logits [batch, position, vocab] or [batch, class], and the output of each node,
        [batch, position, d_model]."""
        passage = Passage(self, len(ids), reads, sends)
        try:
            with passage.on():
                outputs = outputs_of(self.model)(ids, grad=grad)
        finally:
            passage.forward.clear()  # a circle, by which all outputs and their graph would outlive the run
        return outputs, passage.sent


class Passage(Run):
    """One run in which `reads` replaces the streams of inputs and `sends` the outputs of nodes."""

    def __init__(self, wiring: Wiring, batch: int, reads: Reads | None, sends: Sends | None) -> None:
        self.wiring, self.reads, self.sends = wiring, reads, sends
        self.sent: list[Tensor] = []
        self.stream = torch.empty(0)
        self._read: dict[int, Tensor | None] = {}
        self._missing: Tensor | None = None
        places: list[Activation] = []
        forward: dict[str, list[Callable[..., Tensor | None]]] = {}
        known = transformer_lens_names.places(wiring.model)

        def add(place: Activation, function: Callable[..., Tensor | None]) -> None:
            places.append(place)
            forward[place.name] = [function]

        groups = {(group.layer, group.kind): group for group in wiring.groups}
        for layer, found in wiring.layers.items():
            start = f"blocks.{layer}."
            add(known[start + "hook_resid_pre"], self._entering(layer))
            for kind in ("q", "k", "v") if reads is not None else ():
                add(known[f"{start}attn.hook_{kind}"], self._projecting(groups[layer, kind], found, kind))
            if reads is not None and found.gate is not None:
                place = Activation(f"{start}attn.hook_gate", "features", found.gate.module, found.gate.heads)
                add(place, self._gating(groups[layer, "q"], found, found.gate))
            add(known[start + "attn.hook_z"], self._heads(found))
            if sends is not None:
                add(known[start + "hook_attn_out"], self._completing)
            if found.cross is not None:
                place = Activation(start + "hook_other_attn_in", "input", found.cross.norm1)
                add(place, self._reading(groups[layer, CROSS], None))
                add(known[start + "hook_other_attn_out"], self._whole)
            if found.block.mlp_out is not None:
                reader = found.block.norm2 if found.block.norm2 is not None else found.block.mlp
                place = Activation(start + "hook_resid_mid", "input", reader)
                add(place, self._reading(groups[layer, "mlp"], found))
                add(known[start + "hook_mlp_out"], self._whole)
        last = wiring.layers[max(wiring.layers)].block.module
        add(Activation("hook_resid_final", "output", last), self._reading(wiring.groups[-1], None))
        super().__init__(wiring.model, places, batch, forward=forward)

    def _after(self, place: Activation, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Replace the module's output by keys or values of every query head, which are more features."""
        if not self.wiring.wide or not place.name.endswith(("hook_k", "hook_v")):
            return super()._after(place, module, args, output)
        self.missed.discard(place.name)
        found = self.forward[place.name][0](output, hook=None)
        assert found is not None
        return found.flatten(-2)

    def _entering(self, layer: int) -> Callable[..., Tensor | None]:
        def function(x: Tensor, hook: Any) -> Tensor:
            if layer == min(self.wiring.layers):
                x = self._said(x[None])[0]
            self.stream = x
            self._read.clear()
            return x

        return function

    def _said(self, outputs: Tensor) -> Tensor:
        """Record the outputs of the next nodes [node, batch, position, d_model], after `sends`, and return them."""
        changed = None if self.sends is None else self.sends(len(self.sent), outputs)
        outputs = outputs if changed is None else changed
        self.sent += outputs.unbind(0)
        return outputs

    def _projecting(self, group: Inputs, layer: _Layer, kind: str) -> Callable[..., Tensor | None]:
        weight, bias = (getattr(layer.weights, f"{letter}_{kind.upper()}") for letter in "Wb")

        def function(_: Tensor, hook: Any) -> Tensor | None:
            streams = self._streams(group)
            if streams is None:
                if not self.wiring.wide or kind == "q":
                    return None
                streams = self.stream[:, None].expand(-1, len(group.names), -1, -1)
            normed = normed_of(layer.block.norm1, streams)
            return torch.einsum("brsd,rde->bsre", normed, weight.detach().to(normed)) + bias.to(normed)

        return function

    def _gating(self, group: Inputs, layer: _Layer, gate: Projection) -> Callable[..., Tensor | None]:
        weight, bias = gate.weights()

        def function(_: Tensor, hook: Any) -> Tensor | None:
            streams = self._streams(group)
            if streams is None:
                return None
            normed = normed_of(layer.block.norm1, streams)
            found = torch.einsum("brsd,dre->bsre", normed, weight.detach().to(normed))
            return found if bias is None else found + bias.to(found)

        return function

    def _streams(self, group: Inputs) -> Tensor | None:
        """What `reads` gives for these inputs, asked once: queries and their gate read the same streams."""
        assert self.reads is not None
        if group.first not in self._read:
            self._read[group.first] = self.reads(group, self.stream, self.sent)
        return self._read[group.first]

    def _heads(self, layer: _Layer) -> Callable[..., Tensor | None]:
        weights = layer.weights

        def function(z: Tensor, hook: Any) -> None:
            parts = torch.einsum("bshe,hed->hbsd", z, weights.W_O.to(z))
            if layer.behind is not None:  # one scale for all heads, who share the bias equally
                parts = parts + weights.b_O.to(z) / len(parts)
                norm = layer.behind.at(backward_rules.constant(parts.sum(0)))
                parts = norm.linear(parts) / norm.deviation[..., None]
            said = self._said(parts)
            self._missing = (said - parts).sum(0) if said is not parts else None

        return function

    def _completing(self, output: Tensor, hook: Any) -> Tensor | None:
        return None if self._missing is None else output + self._missing

    def _whole(self, output: Tensor, hook: Any) -> Tensor | None:
        """The output of a node that is a module: an MLP, a layer's cross-attention."""
        return self._said(output[None])[0]

    def _reading(self, group: Inputs, layer: _Layer | None) -> Callable[..., Tensor | None]:
        def function(given: Tensor, hook: Any) -> Tensor | None:
            shared = layer is not None and layer.parallel and layer.block.norm2 is None
            x = self.stream if shared else given
            found = None if self.reads is None else self.reads(group, x, self.sent)
            if found is None:
                return None
            read = found[:, 0]
            # one norm serves attention and MLP: the module is the MLP itself, so its input is already normalised
            norm = layer.block.norm1 if layer is not None and shared else None
            return read if norm is None else norm(read)

        return function


def _short(model: HookedModel) -> Tensor:
    """A short input: some token ids, or that on which the model was opened."""
    given = short_input(model, LENGTH)
    if reads_text_alone(model):
        return given["input_ids"]
    return model.to_tokens(**dict[str, Any](given))


def _refuse(model: HookedModel) -> None:
    part = model.parts[model.part_name]
    if part.crosses:
        raise AnalysisError(
            f"the heads of {part.name} in {model.name} read two streams; take the graph of {part.queries!r}, in which "
            "the cross-attention of a layer is one node, or patch and path_patch"
        )
    refuse_mixers(
        model.name, model.mixers, "a graph of heads and MLPs",
        instead="use patch, or path_patch, where a mixer is a sender and is frozen like an MLP",
    )  # fmt: skip
    if alone := next((b for b in model.stack if b.layer not in model.layers and b.steps), None):
        raise AnalysisError(
            f"block {alone.layer} of {model.name} holds {alone.steps[0].name} without attention, which has no place in "
            "a graph of heads and MLPs; use patch or path_patch"
        )
    if model.edits:
        raise AnalysisError(
            "edits are on; edges are those of a model as it is, so leave the block of model.edit"
        )
