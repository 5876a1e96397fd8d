"""The last hidden states of a run that is made for something else, and the losses that follow from them.

The language head runs over blocks of positions: at 8,192 tokens and a vocabulary of 49,152 all logits take 1.6 GB.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention.module_hooks import on
from headwater.lens.models.classes import logits_of
from headwater.lens.models.opened import Opened
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import heed
from headwater.lens.running.losses import next_token_losses

BLOCK = 512  # positions whose logits are in memory at once


class LastStates:
    """What the last run of one text gave: the output of the model's body, and the logits of the last position."""

    def __init__(self, model: Opened) -> None:
        self.model = model
        self.body: Any = None
        self.logits: Tensor | None = None

    def losses(self, given: Tokens) -> tuple[Tensor, Tensor] | None:
        """`next_token_losses` of the text, [1, position-1] each; None where the head can not be run by itself.

        It can not where the model's output is not its head on its body's output. Of this the last position is the test.
        Nor is it asked of texts with labels of their own.
        """
        states = getattr(self.body, "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != given.ids.shape or self.logits is None:
            return None
        if given.labels is not None or self.model.is_encoder_decoder or states.shape[1] < 2:
            return None
        last = self._head(states[:, -1:])
        if last is None or last.shape != (1, 1, self.logits.shape[-1]) or not _same(last[:, 0], self.logits):
            return None
        losses, real = [], []
        for start in range(0, states.shape[1] - 1, BLOCK):
            heed()
            stop = min(start + BLOCK, states.shape[1] - 1) + 1  # the last row is the target of the one before
            block = Tokens(given.ids[:, start:stop], given.mask[:, start:stop])
            found = next_token_losses(self._head(states[:, start:stop]), block)
            losses.append(found[0])
            real.append(found[1])
        return torch.cat(losses, 1), torch.cat(real, 1)

    def _head(self, states: Tensor) -> Any:
        """The logits of some positions, by the model without its body."""
        hf = self.model.hf
        shell = copy.copy(hf)
        said = type(self.body)(**{**self.body, "last_hidden_state": states})
        shell._modules = {**hf._modules, hf.base_model_prefix: _Said(said)}
        blank = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        with torch.no_grad():
            try:
                return logits_of(shell(input_ids=blank, use_cache=False))
            except Exception:  # what a forward may do with its body besides has no bounds
                return None


class _Said(nn.Module):
    """A body that has run already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two sets of logits are equal, up to the precision of their products."""
    near = 1e-4 if other.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((one - other).abs().max() <= near * other.abs().max())


@contextlib.contextmanager
def last_states(model: Opened) -> Iterator[LastStates]:
    """Inside, what the body and the head of the model give in the last run of this context; of one text at a time."""
    found = LastStates(model)
    body = getattr(model.hf, getattr(model.hf, "base_model_prefix", "") or "", None)
    parts = [model.hf, *([body] if isinstance(body, nn.Module) else [])]

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is body:
            found.body = output
        elif (logits := logits_of(output)) is not None and logits.dim() == 3:
            found.logits = logits[:, -1].detach()

    with on(parts, after=keep):
        yield found
