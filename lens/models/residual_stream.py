"""Read the residual stream at the input of each block with attention and after the last block of all, in the caller's
context only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from headwater.lens.attention import shortening
from headwater.lens.attention.module_hooks import first_output, hidden_states, on
from headwater.lens.models import blocks
from headwater.lens.models.opened import Opened


@contextlib.contextmanager
def listening(model: Opened, take: Callable[[int | str, Tensor], None]) -> Iterator[None]:
    """Call `take(layer, stream)` at the input of each block with attention, and `take("final", stream)` after the last.

    `stream` is [batch, position, d_model].
    """
    layers = {blocks.block(model, layer).module: layer for layer in model.layers}

    def entering(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = layers[block]
        take(layer, shortening.at_length(model.key, layer, hidden_states(args, kwargs)))

    def leaving(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take("final", first_output(output))

    last = model.hf.get_submodule(model.stack[-1].path) if model.stack else list(layers)[-1]
    with on(layers, before=entering), on(last, after=leaving):
        yield
