"""One forward pass with the active edits, and what comes from it: the output, a record, head outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.errors import ModelError, PromptError, RecordError
from headwater.lens.mixers import sampled
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.mixers.reading import reading
from headwater.lens.models import inputs, read_only
from headwater.lens.models.axes import TEXTS, axis
from headwater.lens.models.linear import refuse_without_gradient
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import parameters
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress
from headwater.lens.records import destination, plan, sinks
from headwater.lens.records.memory import total
from headwater.lens.records.provenance import provenance
from headwater.lens.records.record import Record
from headwater.lens.records.recorder import Recorder
from headwater.lens.running import backward_pass, ids, padding


def forward(model: Opened, given: Tokens, grad: bool = False, **more: Any) -> Any:
    """The output object of the transformers model for these tokens; `more` are options of its `forward`."""
    check_ready(model, given)
    gates = [context.current_gates(key) for key in model.part_keys.values()]
    wants_grad = grad or any(gate is not None and gate.requires_grad for gate in gates)
    if model.read_only and any(context.listeners(key) for key in model.part_keys.values()):
        return read_only.run(model, given, more, grad)
    if wants_grad:
        refuse_without_gradient(model.hf.modules())
    rules = backward_pass.through(model) if wants_grad else contextlib.nullcontext()
    with torch.enable_grad() if wants_grad else torch.no_grad(), _said(model), rules:
        return model.hf(**inputs.arguments(model, given), **more)


def _no_logits(model: Opened) -> dict[str, Any]:
    """The option with which `forward` gives logits of no position, for runs that look at none: at 4,096 tokens and a
    vocabulary of 49,152 all of them take 805 MB, and the head of a small model is a fifth of its weights. Those of the
    last position are computed where a hook on the model or its head may look at them. A number in the place of the
    tensor would let Gemma 4 leave positions out of its last layers too."""
    if "logits_to_keep" not in parameters(model.hf):
        return {}
    heard = any(each._forward_hooks or each._forward_pre_hooks for each in (model.hf, *_heads(model.hf)))
    return {"logits_to_keep": torch.tensor([-1] if heard else [], dtype=torch.long, device=model.device)}


def _heads(hf: nn.Module) -> Iterator[nn.Module]:
    """The modules beside the body of a model, which make its output from the body's."""
    body = getattr(hf, getattr(hf, "base_model_prefix", "") or "", None)
    return (each for child in hf.children() if child is not body for each in child.modules())


@contextlib.contextmanager
def _said(model: Opened) -> Iterator[None]:
    """PromptError where a classifier finds the end of a text by a padding token that its configuration lacks, and
    where a tower takes pictures of one size alone."""
    try:
        yield
    except ValueError as error:
        if "image size" in str(error):
            raise PromptError(
                f"{model.name} takes pictures of one size: {' '.join(str(error).split())} give them as its processor "
                "makes them"
            ) from None
        if "padding token" not in str(error):
            raise
        raise PromptError(
            f"{model.name} reads one text at a time, as its configuration names no padding token; give texts one by "
            "one, or set model.hf.config.pad_token_id to a token that no text ends with"
        ) from None


def check_ready(model: Opened, given: Tokens, following: int = 0) -> None:
    """Everything that must hold before a run: ModelError in training mode or when compiled, EditError for edits that
    name positions beyond the prompt and the `following` tokens. Finds the sinks that edits name."""
    if model.hf.training:
        raise ModelError(
            f"{model.name} is in training mode, where dropout makes attention random; call model.hf.eval()"
        )
    if _is_compiled(model.hf):
        raise ModelError(
            f"{model.name} was compiled in place, and torch.compile can not trace a model that Headwater reads; "
            "load it again and leave it uncompiled"
        )
    if not following:
        padding.refuse_moved(model, given)
    for name, part in model.parts.items():
        edits = context.active(model.part_keys[name])
        sides = [axis(part, side, given) for side in (part.queries, part.keys)] if edits else []
        longest = max((int(side.mask.sum(-1).max()) for side in sides if side is not None), default=0)
        longest += following if name == next(iter(model.parts)) or part.crosses else 0
        if not longest:
            continue
        for edit in edits:
            edit.check_prompt(given, longest, following)
        if rules := [rule for edit in edits for rule in edit.sink_rules()]:
            _find_sinks(model.part(name), rules, given)


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module, or one in it, was compiled in place."""
    # `modules()` takes five times as long, as much as the attention of five layers of a short text
    waiting = [module]
    while waiting:
        inner = waiting.pop()
        if getattr(inner, "_compiled_call_impl", None) is not None:
            return True
        waiting += [each for each in inner._modules.values() if each is not None]
    return False


def _find_sinks(model: Opened, rules: Iterable[str], given: Tokens) -> None:
    """Find the sinks that edits name, from one unedited run of the prompt, and keep them for the edited run."""
    rules = list(dict.fromkeys(rules))
    part = model.parts[model.part_name]
    side = axis(part, part.queries, given) if part.queries in TEXTS else None
    statistics, keep = sinks.needs(rules)
    with context.alone(model.key):
        found = record(model, given, plan.recorders(model, given, statistics, "all", keep, None))
    ids.know_sinks(model.key, {rule: sinks.find(found, rule) for rule in rules}, side)


def record(
    model: Opened, given: Tokens, recorders: Mapping[str, Recorder],
    keep_on: destination.KeepOn = "device", path: str | Path | None = None,
) -> Record:  # fmt: skip
    """The record of one run; `recorders` come from `plan.recorders`. If they keep graphs, the record has the output."""
    grad = any(recorder.grad for recorder in recorders.values())
    if grad:
        _refuse_no_graph(recorders.values(), keep_on)
        if torch.is_inference_mode_enabled():  # no_grad is lifted for the run, inference mode can not be
            raise RecordError(
                "grad=True finds no graph in torch.inference_mode(); record outside of it, or leave grad=True out"
            )
    cost = total(recorders.values(), whole=keep_on == "disk")
    with destination.keeping(recorders, keep_on, path, cost) as kept:
        layers = sum(len(recorder.layers) for recorder in recorders.values())
        with (
            progress(total=layers, desc="record", unit="layer") as bar,
            destination.listening(recorders),
        ):
            for recorder in recorders.values():
                recorder.tell = bar.update
            output = forward(model, given, grad, **({} if grad else _no_logits(model)))
        found = kept.finish(plan.finish(model, given, recorders), model.part_name)
    return replace(found, output=output) if grad else found


def _refuse_no_graph(recorders: Iterable[Recorder], keep_on: str) -> None:
    """RecordError for what can not keep a graph."""
    if keep_on == "disk":
        raise RecordError("a file holds no graph, so grad=True is for keep_on='device' or 'cpu'")
    if any(recorder.keeps_mixers for recorder in recorders):
        raise RecordError(
            "the maps of layers without softmax attention carry no gradient; leave 'mixers' out"
        )


def head_outputs(
    model: Opened, given: Tokens, edited: bool = True
) -> Float[Tensor, "batch layer head position d_value"]:
    """`HookedModel.head_outputs`."""
    found = outputs_by_layer(model, given, edited)
    if len(widths := {z.shape[-1] for z in found.values()}) > 1:
        raise ModelError(
            f"the heads of {model.name} have {' and '.join(map(str, sorted(widths)))} features, by layer, so their "
            "outputs do not stack; take blocks.0.attn.hook_z and so on from run_with_cache"
        )
    return torch.stack(list(found.values()), 1)


def outputs_by_layer(
    model: Opened, given: Tokens, edited: bool = True
) -> dict[int, Float[Tensor, "batch head position d_value"]]:
    """Head outputs of each layer, whose widths may differ."""
    model.refuse_read_only("give no head outputs")
    outputs = _Outputs(model.key)
    with context.listening(outputs), contextlib.nullcontext() if edited else context.unedited(model.key):
        forward(model, given, **_no_logits(model))
    if missing := [layer for layer in model.layers if layer not in outputs.by_layer]:
        raise ModelError(
            f"layers {missing} of {model.name} did not call attention on these inputs, so they have no head outputs; "
            "give inputs that go through every layer"
        )
    return {layer: outputs.by_layer[layer] for layer in model.layers}


def mixer_maps(model: Opened, given: Tokens) -> dict[int, EffectiveMap]:
    """`HookedModel.mixer_maps`."""
    if not model.mixers:
        raise ModelError(
            f"every layer of {model.name} that mixes positions is attention; model.record(…) gives its maps"
            + (
                "; model.sampled_maps(…) those of its deformable attention"
                if sampled.sampling(model.hf)
                else ""
            )
        )
    with reading(model, provenance(model)) as found:
        forward(model, given, **_no_logits(model))
    return found


def sampled_maps(model: Opened, given: Tokens) -> dict[str, sampled.SampledMap]:
    """`HookedModel.sampled_maps`."""
    with sampled.reading(model.name, model.hf, provenance(model)) as found:
        forward(model, given)
    return found


class _Outputs:
    """Listener that keeps z of every layer."""

    def __init__(self, model: object) -> None:
        self.model = model
        self.statistics: tuple[str, ...] = ()
        self.grad = False
        self.by_layer: dict[int, Tensor] = {}

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        self.by_layer[layer] = output.detach()
