"""`ForeignModule`: a module of anybody's, with what Headwater asks of a transformers model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from headwater.lens.attention import module_hooks
from headwater.lens.attention.module_hooks import Given
from headwater.lens.errors import HeadwaterError, ModelError, named_line
from headwater.lens.foreign.arguments import Arguments, batch_axes
from headwater.lens.foreign.meeting import AttentionCall, Key, Meeting, Met, is_met
from headwater.lens.foreign.named_axes import AxisNames
from headwater.lens.models.axes import counted
from headwater.lens.naming.measured import Measured
from headwater.lens.naming.tokens import Tokens

KNOWN = 256  # shapes of inputs whose numbers of tokens are remembered


class ForeignModule(nn.Module):
    """Runs `module` so that its attention calls are met; its inputs are the tensors of `arguments` by name.

    `sites` are the calls that are layers, `places` the first site of every part, `batch` the number of examples of the
    sample.
    """

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.module = module
        self.config = PreTrainedConfig()
        self.arguments = arguments
        self.sites: dict[Key, AttentionCall] | None = None
        self.calls_of = nn.ModuleList()  # the same, so that what looks a layer up among the modules finds it
        self.places: dict[str, Key] = {}
        self.named: AxisNames | None = None
        self.along: dict[str, int | None] = batch_axes(arguments.tensors, self._first_size(arguments.tensors))
        self._lengths: dict[Any, dict[tuple[str, str], Tokens]] = {}

    def stand_on(self, sites: Mapping[Key, AttentionCall], places: Mapping[str, Key]) -> None:
        """Take these calls as the layers of the model."""
        self.sites, self.places = dict(sites), dict(places)
        self.calls_of = nn.ModuleList(sites.values())

    @staticmethod
    def _first_size(tensors: Mapping[str, Tensor]) -> int:
        return next((len(given) for given in tensors.values() if given.dim()), 1)

    def learn(self) -> dict[Key, Met]:
        """The attention calls on the sample; the axis of the batch of each input is known from then on."""
        tensors = self.arguments.tensors
        met = self.calls(tensors)
        rows = [len(each.call.q) for each in met.values() if len(each.call.shape) > 3]
        batch = self._first_size(tensors)
        if any(
            count % batch for count in rows
        ):  # examples do not stand on the first axis (batch_first=False)
            sizes = [size for given in tensors.values() for size in given.shape[:2]]
            batch = next((size for size in sizes if size in rows), batch)
        before, self.along = self.along, batch_axes(tensors, batch)
        for name, given in tensors.items():
            if given.shape[:2] == (batch, batch) and batch > 1 and self._is_of_one_example(name, met):
                self.along[name] = 1
        return met if self.along == before else self.calls(tensors)

    def _is_of_one_example(self, name: str, met: Mapping[Key, Met]) -> bool:
        """Whether a change at the first place of the second axis reaches the first example alone: this tells which axis
        counts the examples of a sample that is as long as its batch."""
        given = self.arguments.tensors[name]
        if given.dtype == torch.bool:
            return False
        other = given.clone()
        other[:, 0] = given[:, -1]
        found = self.calls({**self.arguments.tensors, name: other})
        for key, each in found.items():
            q, before = each.call.q, met[key].call.q if key in met else None
            if (
                before is not None
                and len(q) == len(given)
                and q.shape == before.shape
                and not q.equal(before)
            ):
                return q[1:].equal(before[1:])
        return False

    def calls(self, tensors: Mapping[str, Tensor], given: Given | None = None) -> dict[Key, Met]:
        """The attention calls of one run, with no edit on; `given` are the arguments that hold the tensors, if they
        are not those of the sample."""
        meeting = Meeting(self.module, self._batch(tensors), None)
        args, kwargs = self.arguments.filled(tensors) if given is None else given
        with torch.no_grad(), module_hooks.off(), meeting.acting():
            self.module(*args, **kwargs)
        return meeting.met

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    @property
    def batch(self) -> int:
        """Number of examples of the sample."""
        return self._batch(self.arguments.tensors)

    def _batch(self, tensors: Mapping[str, Tensor]) -> int:
        sizes = (
            tensors[name].shape[axis]
            for name, axis in self.along.items()
            if axis is not None and name in tensors
        )
        return next(sizes, 1)

    def forward(self, **tensors: Tensor) -> Any:
        """The module's own output."""
        if self.module.training:
            raise ModelError(f"{self.kind} is in training mode; call its eval()")
        args, kwargs = self.arguments.filled(tensors)
        if is_met(self.module):
            return self.module(*args, **kwargs)
        with Meeting(self.module, self._batch(tensors), self.sites).acting(), said(self.kind, "these inputs"):
            return self.module(*args, **kwargs)

    def measured(self, tensors: Mapping[str, Tensor], main: str, given: Given | None = None) -> Measured:
        """The inputs of a call with the tokens of every part, from a run where inputs of this shape did not run yet or
        where a mask may tell which tokens are real; `given` as in `calls`."""
        shapes = tuple((name, tuple(given.shape)) for name, given in sorted(tensors.items()))
        axes = self._lengths.get(shapes)
        if axes is None:
            with said(self.kind, "these inputs"):
                met = self.calls(tensors, given)
            axes = {}
            for name, key in self.places.items():
                if key not in met:
                    continue
                call, own = met[key].call, self.sites is not None and self.sites[key].own
                real = call.padding()
                real = None if real is None else ~real
                queries, keys = call.lengths
                axes[name, "queries"] = counted(
                    len(call.q), queries, real if own and queries == keys else None
                )
                axes[name, "keys"] = counted(len(call.q), keys, real)
            if not any(each.call.masked for each in met.values()):
                if len(self._lengths) >= KNOWN:
                    self._lengths.clear()
                self._lengths[shapes] = axes
        if (main, "queries") not in axes:
            raise ModelError(
                f"{self.kind} does not call the attention of {main!r} on these inputs as it did on the sample; load "
                "the module with a sample that takes the same way"
            )
        rows, batch = axes[main, "queries"], self._batch(tensors)
        if len(rows) != batch:  # frames or windows are rows of attention, and no examples
            rows = counted(batch, rows.shape[1])
        along = self.along if set(tensors) <= set(self.along) else batch_axes(tensors, batch)
        found = Measured.of(rows, dict(tensors), axes, along, {})
        found.named = {} if self.named is None else dict(self.named.labels(found))
        return found

    def get_input_embeddings(self) -> None:
        """None: no table of words is known."""
        return None

    def get_output_embeddings(self) -> None:
        """None: no language head is known."""
        return None

    @property
    def base_model(self) -> ForeignModule:
        """Itself, as transformers' models without a head."""
        return self


@contextmanager
def said(name: str, inputs: str = "the sample") -> Iterator[None]:
    """ModelError for whatever the module raises on these inputs."""
    try:
        yield
    except (HeadwaterError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error).__module__.startswith(
            "torch._dynamo"
        ):  # flex_attention compiles itself and meets no mode
            raise ModelError(
                f"{name} runs code that torch compiles, such as flex_attention; attention inside of it can not be read"
            ) from error
        raise ModelError(f"{name} fails on {inputs}: {named_line(error)}") from error
