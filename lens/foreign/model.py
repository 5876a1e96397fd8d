"""`ForeignModel`: a module outside transformers, with the methods of a `HookedModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.lens.errors import ModelError
from headwater.lens.foreign.arguments import numbers_in
from headwater.lens.foreign.module import ForeignModule
from headwater.lens.model import HookedModel
from headwater.lens.naming.measured import Measured
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.forward import forward


class ForeignModel(HookedModel):
    """A module whose attention calls `scaled_dot_product_attention`, opened with `hw.load(module, sample=…)`.

    What `forward` takes is what every method takes: a tensor, a tuple of arguments, a dictionary, or arguments by name.
    `parts` are stacks of attention calls, "self", "cross" or "self:encoder"; tokens are numbered by position. The
    module has no vocabulary that Headwater knows of: a loss or a measure is given as a function of its output.

    >>> import headwater as hw, torch
    >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=4, batch_first=True)
    >>> model = hw.load(torch.nn.TransformerEncoder(layer, 2), sample=torch.randn(1, 6, 16))
    >>> model.record(torch.randn(2, 9, 16)).pattern(layer=1, head=0).shape
    torch.Size([2, 9, 9])
    """

    hf: ForeignModule

    @property
    def module(self) -> torch.nn.Module:
        """The module that was given to `load`."""
        return self.hf.module

    def to_tokens(
        self, given: Any = None, attention_mask: Any = None, side: Literal["left", "right"] = "right", *,
        prepend_bos: bool | None = None, **more: Any,
    ) -> Measured:  # fmt: skip
        """The inputs of a call: the tensors that the module's `forward` takes are `more`, by name.

        `ids` number the queries of the main part. Where inputs have another shape than before, or a mask comes,
        the module runs once to tell how many tokens there are and which are padding.
        """
        if attention_mask is not None:
            more = {**more, "attention_mask": attention_mask}
        if isinstance(given, Measured) and not more:
            return given
        if isinstance(given, Tokens):
            tensors: Mapping[str, Tensor] = {**given.more, **more}
        else:
            tensors = self.hf.arguments.named(given, more)
        placed = {
            n: t.to(self.device, self.dtype if t.is_floating_point() else None) for n, t in tensors.items()
        }
        return self.hf.measured(placed, next(iter(self.parts)))

    def __call__(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Any:
        """What the module's `forward` returns, with the edits that are on."""
        return forward(self, self.to_tokens(given, attention_mask, **more), grad)

    def embeddings(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Tensor:
        """The first floating-point tensor of what the module returns, with the edits that are on."""
        found = next(numbers_in(self(given, attention_mask, grad=grad, **more)), None)
        if found is None:
            raise ModelError(f"{self.name} returns no floating-point tensor")
        return found

    def loss(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Tensor:
        """ModelError: what a foreign module should give is not known."""
        raise ModelError(f"what is right for {self.name} is not known; give a loss= of its output")

    def generate(self, *given: Any, **options: Any) -> Any:
        """ModelError: a foreign module generates by its own code."""
        raise ModelError(
            f"{self.name} is no model of transformers, so Headwater generates nothing with it; let your own code "
            "call the open model, inside `with model.edit(…)` where it should be edited"
        )

    @property
    def device(self) -> torch.device:
        return self._number().device

    @property
    def dtype(self) -> torch.dtype:
        return self._number().dtype

    def _number(self) -> Tensor:
        """A parameter or buffer; one of the sample where the module has none."""
        held = (
            *self.hf.parameters(),
            *self.hf.buffers(),
            *self.hf.arguments.tensors.values(),
            torch.zeros(0),
        )
        return next(each for each in held if each.is_floating_point())
