"""Read the residual stream at the input of each block and after the last block, in the caller's context only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from headwater.lens.attention.module_hooks import first_output, hidden_states, on
from headwater.lens.models import blocks
from headwater.lens.models.opened import Opened


@contextlib.contextmanager
def listening(model: Opened, take: Callable[[int | str, Tensor], None]) -> Iterator[None]:
    """Call `take(layer, stream)` at the input of each block, and `take("final", stream)` after the last.

    `stream` is [batch, position, d_model].
    """
    layers = {blocks.block(model, layer).module: layer for layer in model.layers}

    def entering(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(layers[block], hidden_states(args, kwargs))

    def leaving(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take("final", first_output(output))

    with on(layers, before=entering), on(list(layers)[-1], after=leaving):
        yield
