"""Find the norms of every block by what they do: whose output do the attention, the MLP and the language head read?

One short run keeps what each module of a block was given and gave. A module reads a norm if the tensor that it gets is
the norm's output, and the norm does what the formula of LayerNorm or RMSNorm says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention import context, module_hooks
from headwater.lens.models.norms import HEAD, Flow, is_norm
from headwater.lens.models.parts import Part
from headwater.lens.models.stack import block_around


@dataclass(eq=False)
class _Call:
    """What a module was given and gave: copies, since some blocks add in place, and the tensors themselves."""

    given: Tensor
    output: Tensor
    tensors: tuple[Tensor, Tensor]


Seen = dict[nn.Module, _Call]


def with_flows(hf: Any, parts: Mapping[str, Part], sample: Mapping[str, Tensor]) -> dict[str, Part]:
    """The parts with the flow of each layer's block; the main part has that of the language head too."""
    blocks = {
        name: {layer: block_around(hf, part.stack, module) for module, layer in part.modules.items()}
        for name, part in parts.items()
    }
    every = {block for of in blocks.values() for block in of.values() if block is not None}
    look = _Look(hf, every, {hf.get_submodule(block.path) for part in parts.values() for block in part.stack})
    with torch.no_grad(), context.discovering(), ExitStack() as stack:
        for block in every:
            stack.enter_context(look.at_block(block))
        head = _head(hf)
        if head is not None:
            stack.enter_context(look.at_head(head))
        hf(**sample)
    flows: dict[str, dict[int | str, Flow]] = {
        name: {layer: look.found[block] for layer, block in of.items() if block in look.found}
        for name, of in blocks.items()
    }
    if head in look.found:
        flows[next(iter(parts))][HEAD] = look.found[head]
    return {name: replace(part, flows=flows[name]) for name, part in parts.items()}


@dataclass(eq=False)
class _Look:
    """One run: `blocks` hold attention that is read, `stack` are all entries of their lists."""

    hf: nn.Module
    blocks: set[nn.Module]
    stack: set[nn.Module]
    found: dict[nn.Module, Flow] = field(default_factory=dict)
    last: list[Tensor] = field(default_factory=list)  # what the block that ran last gave

    @contextmanager
    def at_block(self, block: nn.Module) -> Iterator[None]:
        """Find the flow of a block as soon as it has run, so that tensors of one block are kept at a time."""

        def done(seen: Seen) -> None:
            self.last = [seen[block].output] if block in seen else []
            if block in seen:
                self.found[block] = _flow(seen, [block], [seen[block].given])
            seen.clear()

        with _keeping(set(block.modules()), block, done):
            yield

    @contextmanager
    def at_head(self, head: nn.Module) -> Iterator[None]:
        """Find what the head reads: the last block's output, or a norm that reads that."""
        inside = {module for block in self.blocks for module in block.modules()}
        outside = {m for m in self.hf.modules() if m not in inside and m is not self.hf} | {head}

        def done(seen: Seen) -> None:
            around = [m for m in seen if m in self.stack or self.blocks & set(m.modules())]
            ends = [*self.last, *(seen[module].output for module in around)]
            if head in seen:
                flow = _flow(seen, around, ends)
                straight = {
                    module: norm
                    for module, norm in flow.reads.items()
                    if module is head and (norm is None or any(_same(seen[norm].given, end) for end in ends))
                }
                self.found[head] = Flow(straight, {})
            seen.clear()

        with _keeping(outside, head, done):
            yield


@contextmanager
def _keeping(modules: set[nn.Module], end: nn.Module, done: Callable[[Seen], None]) -> Iterator[None]:
    """Keep the calls of these modules until `end` has run, then hand them to `done`."""
    given: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    seen: Seen = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (kwargs.get("hidden_states"), *args, *kwargs.values())
        states = next((t for t in tensors if _is_stream(t)), None)
        if states is not None:
            given[module] = states.detach().clone(), states

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor: Any = output[0] if isinstance(output, tuple | list) and output else output
        if module in given and _is_stream(tensor):
            copy, states = given.pop(module)
            seen[module] = _Call(copy, tensor.detach().clone(), (states, tensor))
        if module is end:
            with module_hooks.off():
                done(seen)

    with module_hooks.on(modules, before=before, after=after):
        yield


def _flow(seen: Seen, around: list[nn.Module], streams: list[Tensor]) -> Flow:
    """What the modules read and what reads them; `streams` are the tensors that count as the stream itself."""
    norms = [m for m, call in seen.items() if m not in around and is_norm(m, call.given, call.output)]
    reads: dict[nn.Module, nn.Module | None] = {}
    behind: dict[nn.Module, nn.Module] = {}
    for module, call in seen.items():
        if module in around:
            continue
        others = [norm for norm in norms if norm is not module]
        # two norms with equal gains may give equal tensors: the very tensor that was handed on comes first
        before = [norm for norm in others if _same(seen[norm].output, call.given)]
        before.sort(key=lambda norm: seen[norm].tensors[1] is not call.tensors[0])
        if before or any(_same(stream, call.given) for stream in streams):
            reads[module] = before[0] if before else None
        after = [norm for norm in others if _same(seen[norm].given, call.output)]
        if after:
            behind[module] = after[0]
    ends = any(_same(seen[norm].output, seen[m].output) for m in around if m in seen for norm in norms)
    return Flow(reads, behind, ends)


def _head(hf: Any) -> nn.Module | None:
    try:
        return hf.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same vectors, of [batch, position, d] or [batch · position, d]."""
    if one.shape[-1] != other.shape[-1] or one.numel() != other.numel():
        return False
    rows = (tensor.reshape(-1, tensor.shape[-1]).nan_to_num() for tensor in (one, other))
    return torch.equal(*rows)
