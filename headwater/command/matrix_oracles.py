"""Independent ways of having the numbers of the matrix: each reads like its formula, on `Plain`, densely, in float64.

`WAYS` maps the name of an analysis to a function of the plain model and of the result. It gives pairs (found,
expected), which must be equal; the result is read only for what it found and for what it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from headwater.command.matrix_calls import ANSWER, strength
from headwater.command.matrix_inputs import INPUT_WAYS
from headwater.command.matrix_plain import Plain
from headwater.command.matrix_sinks import SINK_WAYS
from headwater.command.matrix_values import VALUE_WAYS
from headwater.lens.loading.coverage import attentions
from headwater.lens.loading.opening import answer
from headwater.lens.naming.tokens import Tokens

Pairs = Iterator[tuple[Any, Any]]
NORMS = (
    "norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "decoder.final_layer_norm",
    "decoder.layer_norm", "language_model.norm",
)  # fmt: skip


# --- records


def raw_attention(plain: Plain, found: Any) -> Pairs:
    yield found[:, 0], plain.weights[-1].mean(1)[:, -1]


def mixed(plain: Plain) -> list[Tensor]:
    """rownorm(A/2 + I/2) of each layer, A the mean of its heads."""
    maps = [dense.mean(1) / 2 + torch.eye(dense.shape[-1]) / 2 for dense in plain.weights]
    return [each / each.sum(-1, keepdim=True) for each in maps]


def steps(plain: Plain) -> list[Tensor]:
    """One matrix [batch, token, token] for each layer: its maps, or those of both sides of an encoder–decoder.

    There an encoder's layer changes the first rows, a decoder's the others, by their own tokens and then by the
    encoder's.
    """
    if not (plain.subject.model.is_encoder_decoder and plain.subject.model.part_name == "decoder"):
        return [each.double() for each in mixed(plain)]
    sides = attentions(plain.hf, plain.given)
    maps = {name: [dense.mean(1).double() for dense in each] for name, each in sides.items()}
    source = maps["encoder"][0].shape[-1]
    count = source + maps["decoder"][0].shape[-1]
    spans = {"encoder": (slice(0, source),) * 2, "decoder": (slice(source, count),) * 2}
    spans["cross"] = spans["decoder"][0], spans["encoder"][0]
    layers = [("encoder", each) for each in maps["encoder"]]
    for own, across in zip(maps["decoder"], maps["cross"], strict=True):
        layers += [("decoder", own), ("cross", across)]
    found = []
    for name, each in layers:
        matrix = torch.eye(count, dtype=torch.float64).repeat(len(each), 1, 1)
        rows, columns = spans[name]
        matrix[:, rows] /= 2
        matrix[:, rows, columns] += each / 2
        found.append(matrix / matrix.sum(-1, keepdim=True))
    return found


def rollout(plain: Plain, found: Any) -> Pairs:
    layers = steps(plain)
    product = torch.eye(layers[0].shape[-1], dtype=torch.float64)
    for layer in layers:
        product = layer @ product
    yield found[:, 0], product[:, -1]


def flow(plain: Plain, found: Any) -> Pairs:
    maps = steps(plain)
    for text, row in enumerate(np.asarray(found[:, 0])):
        graph = nx.DiGraph()
        for layer, each in enumerate(maps):
            for i, j in np.ndindex(*each.shape[1:]):
                graph.add_edge((layer + 1, i), (layer, j), capacity=float(each[text, i, j]))
        top = (len(maps), len(row) - 1)
        flows = np.array([nx.maximum_flow_value(graph, top, (0, j)) for j in range(len(row))])
        yield row, flows / flows.sum()


def _steps(length: int) -> Tensor:
    place = torch.arange(length)
    return (place[:, None] - place).abs()


def attention_distance(plain: Plain, found: Any) -> Pairs:
    for layer, dense in enumerate(plain.weights):
        far = (dense * _steps(dense.shape[-1])).sum(-1) / dense.sum(-1)
        yield found[layer], far.mean((0, 2))


def received(plain: Plain, dense: Tensor) -> Tensor:
    """Mean weight that each key gets from the queries that see it, [batch, head, key]."""
    images = plain.subject.model.part_name == "vision"
    seen = (
        torch.ones_like(dense) if images else dense > 0
    )  # a softmax gives 0 to hidden keys alone, if it is not sure
    return dense.sum(-2) / seen.sum(-2)


def sink_rate(plain: Plain, found: Any) -> Pairs:
    for layer, dense in enumerate(plain.weights):
        yield found.received_share_per_example[:, layer], received(plain, dense)[..., 0]


def find_sinks(plain: Plain, found: Any) -> Pairs:
    for layer, dense in enumerate(plain.weights):
        yield found.score[:, layer], received(plain, dense)


def sink_strength(plain: Plain, found: Any) -> Pairs:
    for layer, dense in enumerate(plain.weights):
        yield found.strength[:, layer], dense[..., 0]


def head_similarity(plain: Plain, found: Any) -> Pairs:
    maps = torch.cat(plain.weights, 1).flatten(2).double()
    maps = maps / maps.norm(dim=-1, keepdim=True)
    yield found, (maps @ maps.mT).mean(0)


# --- heads


def _off(plain: Plain) -> Iterator[tuple[int, int, Tensor]]:
    for layer, head in np.ndindex(len(plain.attention), plain.heads):
        gates = torch.ones(len(plain.attention), plain.heads)
        gates[layer, head] = 0
        yield layer, head, gates


def _ids(plain: Plain) -> Tensor:
    return plain.subject.examples


def head_importance(plain: Plain, found: Any) -> Pairs:
    ids = _ids(plain)
    gates = torch.ones(len(ids), len(plain.attention), plain.heads, requires_grad=True)
    plain.loss(plain.gated(ids, gates), ids).sum().backward()
    assert gates.grad is not None
    yield found, gates.grad.abs().mean(0)


def head_significance(plain: Plain, found: Any) -> Pairs:
    ids = _ids(plain)
    with torch.no_grad():
        before = plain.loss(plain.run(ids), ids)
        for layer, head, gates in _off(plain):
            yield found.per_example[:, layer, head], plain.loss(plain.gated(ids, gates), ids) - before


def all_but_one(plain: Plain, found: Any) -> Pairs:
    ids = _ids(plain)
    with torch.no_grad():
        before = plain.loss(plain.run(ids), ids)
        for layer, head, gates in _off(plain):
            gates[layer] = 1 - gates[layer]
            yield found.per_example[:, layer, head], plain.loss(plain.gated(ids, gates), ids) - before


def prune_heads(plain: Plain, found: Any) -> Pairs:
    ids = _ids(plain)
    for step, removed in enumerate(np.asarray(found.removed)):
        with torch.no_grad():
            outputs = plain.gated(ids, 1 - torch.tensor(removed).float())
        value = plain.loss(outputs, ids) if plain.writes else strength(outputs)
        yield found.per_example[:, step], value


def head_contrast(plain: Plain, found: Any) -> Pairs:
    if found.attrs["how"] == "hide":
        raise LookupError("hidden keys have no plain run")
    ids = _ids(plain)
    cut = ids.changed(ids.ids[:, 1:], ids.mask[:, 1:]) if isinstance(ids, Tokens) else ids[:, 1:]
    whole, without = plain.outputs_of_heads(ids), plain.outputs_of_heads(cut)
    for layer, (a, b) in enumerate(zip(whole, without, strict=True)):
        yield found.divergence[:, layer], (a[:, -1] - b[:, -1]).norm(dim=-1)


def output_gates(plain: Plain, found: Any) -> Pairs:
    plain.outputs_of_heads(_ids(plain))
    for layer, gate in plain.gates.items():
        yield found.gate_mean[:, layer], gate.mean(-1).mT
        yield found.shut[:, layer], (gate < 0.1).double().mean(-1).mT


def patch(plain: Plain, found: Any) -> Pairs:
    ids, other = _ids(plain), plain.subject.corrupt
    clean = plain.outputs_of_heads(ids, before_gate=False)
    with torch.no_grad():
        top, bottom = plain.score(plain.run(ids)), plain.score(plain.run(other))
        for layer, head, gates in _off(plain):

            def restored(at: int, z: Tensor, layer: int = layer, gates: Tensor = gates) -> Tensor | None:
                if at != layer:
                    return None
                keep = gates[layer][:, None]
                return z * keep + clean[layer] * (1 - keep)

            with plain.heads_through(restored, before_gate=False):
                value = plain.score(plain.run(other))
            yield found[:, layer, head] * (top - bottom).numpy(), value - bottom


def path_patch(plain: Plain, found: Any) -> Pairs:
    """Heads as senders, straight to the logits: all other heads of the blocks are frozen, MLPs run."""
    ids, other = _ids(plain), plain.subject.corrupt
    clean, corrupt = (
        plain.outputs_of_heads(ids, before_gate=False),
        plain.outputs_of_heads(other, before_gate=False),
    )
    with torch.no_grad():
        top, bottom = plain.score(plain.run(ids)), plain.score(plain.run(other))
        for layer, head, gates in _off(plain):

            def sent(at: int, _: Tensor, gates: Tensor = gates) -> Tensor:
                keep = gates[at][:, None]
                return clean[at] * keep + corrupt[at] * (1 - keep)

            with plain.beside_frozen(ids), plain.heads_through(sent, before_gate=False):
                value = plain.score(plain.run(ids))
            sender = f"{plain.subject.model.layers[layer]}.{head}"
            yield found.sel(sender=sender) * (bottom - top).numpy(), value - top


# --- tokens


def _slopes_of_maps(plain: Plain) -> list[Tensor]:
    """mean over heads of relu(A · ∂s/∂A) of each layer."""
    out = plain.hf(**plain.inputs(plain.subject.examples), output_attentions=True)
    maps = [dense for dense in out.attentions if dense is not None and dense.shape[-1] == dense.shape[-2]]
    slopes = torch.autograd.grad(plain.score(answer(out)).sum(), maps)
    return [(a * slope).relu().mean(1).detach() for a, slope in zip(maps, slopes, strict=True)]


def relevance(plain: Plain, found: Any) -> Pairs:
    maps = _slopes_of_maps(plain)
    product = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype).expand_as(maps[0])
    for each in maps:
        product = product + each @ product
    yield found[:, 0], product[torch.arange(len(product)), found.position.values[:, 0]]


def gradient_rollout(plain: Plain, found: Any) -> Pairs:
    maps = _slopes_of_maps(plain)
    identity = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    product = identity.expand_as(maps[0])
    for each in maps:
        product = (each + identity) / (each + identity).sum(-1, keepdim=True) @ product
    yield found[:, 0], product[torch.arange(len(product)), found.position.values[:, 0]]


# --- logits


def logit_lens(plain: Plain, found: Any) -> Pairs:
    """The final norm is given the stream of each layer instead of its own input, and the model goes on from there."""
    if not plain.writes:
        raise LookupError("the logits are of classes")
    ids = _ids(plain)
    norm = next(module for name in NORMS if (module := _at(plain.hf.base_model, name)) is not None)
    with torch.no_grad():
        out = plain.hf(**plain.inputs(ids), output_hidden_states=True)
        streams = out.decoder_hidden_states if plain.subject.model.is_encoder_decoder else out.hidden_states
        for place, layer in enumerate(np.asarray(found.layer)):
            stream = None if str(layer) == "final" else streams[int(layer)]
            handle = norm.register_forward_pre_hook(lambda _, args, x=stream: None if x is None else (x,))
            try:
                logits = plain.run(ids)[:, -1]
            finally:
                handle.remove()
            yield found.log_probability[:, place], logits.log_softmax(-1)[:, ANSWER]
            yield found.logit[:, place], logits[:, ANSWER]


def _at(module: Any, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def direct_logit_attribution(plain: Plain, found: Any) -> Pairs:
    if getattr(plain.hf.config.get_text_config(), "final_logit_softcapping", None) is None:
        with torch.no_grad():
            yield found.sum("component"), plain.score(plain.run(_ids(plain)))


def circuit_faithfulness(plain: Plain, found: Any) -> Pairs:
    with torch.no_grad():
        yield found.whole, plain.score(plain.run(_ids(plain)))
        yield found.nothing, plain.score(plain.run(plain.subject.corrupt))


def circuit_curve(plain: Plain, found: Any) -> Pairs:
    with torch.no_grad():
        whole, nothing = (plain.score(plain.run(ids)) for ids in (_ids(plain), plain.subject.corrupt))
    yield found.whole, whole
    yield found.nothing, nothing
    yield found.measure[:, -1], torch.stack([whole, whole])  # all edges are the model


WAYS: dict[str, Callable[[Plain, Any], Pairs]] = {
    each.__name__: each
    for each in (
        raw_attention, rollout, flow, attention_distance, sink_rate, find_sinks, sink_strength, head_similarity,
        head_importance, head_significance, all_but_one, prune_heads, head_contrast, output_gates, patch, path_patch,
        relevance, gradient_rollout, logit_lens,
        direct_logit_attribution, circuit_faithfulness, circuit_curve,
    )
}  # fmt: skip
WAYS |= VALUE_WAYS | INPUT_WAYS | SINK_WAYS


def difference(name: str, plain: Callable[[], Plain], found: Any) -> float | None:
    """The largest difference from the independent way, as a part of the largest number; None where there is none.

    Infinite where one of both is NaN and the other is not.
    """
    if name not in WAYS:
        return None
    worst, size = 0.0, 0.0
    for ours, theirs in WAYS[name](plain(), found):
        ours = np.asarray(ours, dtype=float)
        theirs = np.asarray(theirs.detach() if isinstance(theirs, Tensor) else theirs, dtype=float)
        if ours.shape != theirs.shape or (np.isnan(ours) != np.isnan(theirs)).any():
            return float("inf")
        worst = max(worst, float(np.nanmax(np.abs(ours - theirs), initial=0.0)))
        size = max(size, float(np.nanmax(np.abs(theirs), initial=0.0)))
    return None if size == 0 else worst / size
