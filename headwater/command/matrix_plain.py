"""The same model without Headwater: transformers' own eager attention in float64, changed by plain hooks.

`Plain` gives what the independent ways of `matrix_oracles.py` are made of: dense weights, outputs, and runs in which
the heads' outputs are multiplied, replaced or watched where they enter the output projection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwater.command.matrix_calls import ANSWER, WRONG, Subject, loss, strength
from headwater.lens.loading import zoo
from headwater.lens.loading.coverage import attentions
from headwater.lens.loading.opening import answer
from headwater.lens.naming.tokens import Tokens

PROJECTIONS = (
    "o_proj", "out_proj", "c_proj", "dense", "Wo", "o", "out_lin", "output.dense", "projection_layer", "attn_out",
)  # fmt: skip


class Plain:
    """An untouched copy of a subject's model, and runs of it on the subject's inputs."""

    def __init__(self, subject: Subject) -> None:
        family = zoo.FAMILIES[subject.name.partition("/")[0]]
        self.hf: Any = zoo.build(subject.name.partition("/")[0])
        self.rounds = family.change == "8bit"
        if not family.change.endswith("bit"):  # bitsandbytes multiplies in its own precision
            self.hf = self.hf.double()
        if self.hf._can_set_experts_implementation():
            self.hf.set_experts_implementation("eager")  # the grouped product of experts takes no float64
        kind = next(self.hf.parameters()).dtype
        self.given = {n: x.to(kind) if x.is_floating_point() else x for n, x in subject.given.items()}
        self.subject, self.causal, self.writes = subject, subject.model.causal, subject.model.has_lm_head
        part = subject.model.parts[subject.model.part_name]
        paths = {id(module): path for path, module in subject.model.hf.named_modules()}
        self.heads = subject.model.n_heads
        self.attention = [self.hf.get_submodule(paths[id(module)]) for module in part.modules]
        self.gates: dict[int, Tensor] = {}  # of the last run with hooks, [batch, position, head, d], by layer
        self.paths = [paths[id(module)] for module in part.modules]

    # --- outputs

    def run(self, examples: Tensor | None = None, **more: Any) -> Tensor:
        """Logits, or the last hidden states of a model without a head over a vocabulary; similarities of two towers.

        `examples` are text, images or sound, and all that the model reads.
        """
        return self.answer(self.inputs(examples), **more)

    def answer(self, given: dict[str, Tensor], **more: Any) -> Tensor:
        """The same for inputs under transformers' names."""
        out = self.hf(**given, **more)
        if hasattr(self.hf, "logit_scale"):
            return torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
        return answer(out)

    def inputs(self, examples: Tensor | None) -> dict[str, Tensor]:
        """The arguments of the model for examples, in its precision."""
        if examples is None:
            return {}
        kind = next(self.hf.parameters()).dtype
        if not isinstance(examples, Tokens):
            return {self.subject.reads: examples.to(kind) if examples.is_floating_point() else examples}
        found = {n: t.to(kind) if t.is_floating_point() else t for n, t in examples.more.items()}
        if self.subject.model.vocab:
            found["decoder_input_ids" if self.subject.model.is_encoder_decoder else "input_ids"] = (
                examples.ids
            )
        return found

    def score(self, outputs: Tensor) -> Tensor:
        """What the attributions of the matrix explain: the answer's logit less that of the wrong one, at the end."""
        classes = len(self.subject.model.classes)
        if not self.writes and classes < 2:
            return strength(outputs)
        row = outputs[:, -1] if outputs.dim() == 3 else outputs
        answer, wrong = (ANSWER, WRONG) if self.writes else (1, 0)
        return row[:, answer] - row[:, wrong]

    def loss(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token loss of each text, or the loss that the matrix gives a model without one."""
        if not (self.writes and self.causal):
            return loss(outputs, ids)
        chances = outputs[:, :-1].log_softmax(-1)
        words = (ids[:, 1:] != zoo.IMAGE_TOKEN).to(chances)
        return -(chances.gather(-1, ids[:, 1:, None])[..., 0] * words).sum(-1) / words.sum(-1)

    # --- attention

    @functools.cached_property
    def weights(self) -> list[Tensor]:
        """Dense weights [batch, head, query, key] of each layer of the part."""
        shape = self.subject.record(("qk",)).pattern(self.subject.model.layers[0]).shape
        found = attentions(self.hf, self.given)[self.subject.model.part_name]
        return [dense for dense in found if dense is not None and dense.shape == shape]

    @functools.cached_property
    def weights_of_examples(self) -> list[Tensor]:
        """The same for the examples."""
        found = attentions(self.hf, self.inputs(self.subject.examples))
        return [
            dense for dense in found[self.subject.model.part_name] if dense is not None and dense.dim() == 4
        ]

    @property
    def projections(self) -> list[Any]:
        """The output projection of each layer, by its name inside of the attention or beside it."""
        found = []
        for path, module in zip(self.paths, self.attention, strict=True):
            beside = self.hf.get_submodule(path.rpartition(".")[0])
            known = [_child(of, name) for of in (module, beside) for name in PROJECTIONS]
            found.append(next(each for each in known if each is not None))
        return found

    @contextmanager
    def heads_through(
        self, change: Callable[[int, Tensor], Tensor | None], before_gate: bool = True
    ) -> Iterator[None]:
        """`change(layer, z)` is given the heads' outputs z [batch, position, head, d]; what it returns goes on.

        z is read where it enters the output projection. A gate before that is divided out and multiplied in again,
        unless z behind the gate is asked for.
        """

        gates = self.gates = {}

        def gate(layer: int) -> Callable[..., None]:
            def seen(_: nn.Module, __: Any, output: Tensor) -> None:
                # Qwen3-Next computes queries and gates together, head by head
                split = output.unflatten(-1, (self.heads, -1))
                fused = output.shape[-1] > self.projections[layer].in_features
                gates[layer] = (split.chunk(2, -1)[1] if fused else split).sigmoid()

            return seen

        def hook(layer: int) -> Callable[..., Any]:
            def seen(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
                gate = gates.get(layer, torch.ones(()))
                changed = change(layer, args[0].unflatten(-1, (self.heads, -1)) / gate)
                return None if changed is None else ((changed * gate).flatten(-2), *args[1:])

            return seen

        handles = [each.register_forward_pre_hook(hook(n)) for n, each in enumerate(self.projections)]
        for layer, module in enumerate(self.attention if before_gate else ()):
            by_itself = getattr(module, "gate_proj", None)
            if (
                by_itself is not None
                or "Qwen3Next" in type(module).__name__
                or "Qwen3_5" in type(module).__name__
            ):
                handles.append((by_itself or module.q_proj).register_forward_hook(gate(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def outputs_of_heads(self, ids: Tensor, before_gate: bool = True) -> list[Tensor]:
        """z of each layer, [batch, position, head, d]."""
        kept: list[Tensor] = []
        with self.heads_through(lambda _, z: kept.append(z), before_gate), torch.no_grad():
            self.run(ids)
        return kept

    @contextmanager
    def beside_frozen(self, ids: Tensor) -> Iterator[None]:
        """Attention of other parts in the same blocks (cross-attention of a decoder) gives what it gives for `ids`."""
        model = self.subject.model
        paths = {id(module): path for path, module in model.hf.named_modules()}
        own = model.parts[model.part_name].queries
        beside = [
            self.hf.get_submodule(paths[id(module)])
            for name, part in model.parts.items()
            if name != model.part_name and part.queries == own
            for module in part.modules
        ]
        kept: dict[nn.Module, Any] = {}
        handles = [m.register_forward_hook(lambda m, _, found: kept.update({m: found})) for m in beside]
        try:
            with torch.no_grad():
                self.run(ids)
        finally:
            for handle in handles:
                handle.remove()
        handles = [m.register_forward_hook(lambda m, _, found: kept[m]) for m in beside]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gated(self, ids: Tensor, gates: Tensor) -> Tensor:
        """The output when head h of layer l is multiplied by `gates` [layer, head] or [batch, layer, head]."""
        rows = gates.expand(len(ids), *gates.shape[-2:])
        with self.heads_through(lambda layer, z: z * rows[:, None, layer, :, None]):
            return self.run(ids)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if hasattr(found, "weight") or hasattr(found, "base_layer") else None
