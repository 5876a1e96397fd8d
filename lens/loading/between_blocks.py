"""Find what carries information between positions outside of the blocks, in no module that shows it.

The model runs twice more. In the second run another token stands at one position, and every block gives what it gave
before, changed at one position. What a block is given, and what the model gives, may then differ there alone: elsewhere
something before, between or behind the blocks moves information between positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention import module_hooks
from headwater.lens.models.closeness import answer

IDS = ("input_ids", "decoder_input_ids")
Moved = Callable[[Tensor, Tensor, int], bool]  # whether two tensors differ at other positions than one


def mixing_between(
    hf: Any, blocks: Sequence[nn.Module], sample: Mapping[str, Tensor], last: bool, moved: Moved
) -> bool:
    """Whether positions are mixed before, between or (`last`: these blocks are the model's last) behind the blocks.

    False where it does not show: blocks of several axes, outputs that are not by position.
    """
    first = _Run(blocks)
    expected = answer(first.of(hf, sample))
    if not first.given or any(given.dim() != 3 for given in first.given) or first.given[0].shape[1] < 3:
        return False
    count = first.given[0].shape[1]
    texts = {name: ids for name in IDS if (ids := sample.get(name)) is not None and ids.shape[1:] == (count,)}
    place = _place(texts, count)
    second = _Run(blocks, [_changed(output, place) for output in first.outputs])
    found = answer(
        second.of(hf, {**sample, **{n: _with_another_token(ids, place) for n, ids in texts.items()}})
    )
    pairs = list(zip(first.given, second.given, strict=False))
    if last:
        pairs.append((expected, found))
    return any(
        a.shape == b.shape
        and a.dim() == 3
        and a.shape[1] == count
        and a.is_floating_point()
        and moved(a, b, place)
        for a, b in pairs
    )


def _place(texts: Mapping[str, Tensor], count: int) -> int:
    """A position in the first third or behind it whose token is no repeated one, such as those of an image."""
    start = count // 3
    return next(
        (n for n in range(start, count - 1) if all((t[0] == t[0, n]).sum() == 1 for t in texts.values())),
        start,
    )


def _with_another_token(ids: Tensor, place: int) -> Tensor:
    """The ids with the last token of the first row at one position too, unless the token there is repeated."""
    found = ids.clone()
    if (ids[0] == ids[0, place]).sum() == 1:
        found[0, place] = ids[0, -1]
    return found


def _changed(output: Tensor, place: int) -> Tensor:
    if output.dim() != 3 or output.shape[1] <= place:
        return output
    changed = output.clone()
    changed[0, place] = output[0, place].flip(-1) + output[0, -1]
    return changed


class _Run:
    """One run: what the blocks are given and give, call by call, or what they give in place of it."""

    def __init__(self, blocks: Sequence[nn.Module], instead: Sequence[Tensor] = ()) -> None:
        self.blocks = blocks
        self.instead = list(instead)
        self.given: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def of(self, hf: Any, arguments: Mapping[str, Any]) -> Any:
        with module_hooks.on(self.blocks, before=self._before, after=self._after):
            return hf(**arguments)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = [*args, kwargs.get("hidden_states")]
        given = next((t for t in found if isinstance(t, Tensor) and t.is_floating_point()), torch.empty(0))
        self.given.append(given.detach().clone())

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        place = len(self.outputs)
        self.outputs.append(module_hooks.first_output(output).detach().clone())
        if place >= len(self.instead):
            return None
        return module_hooks.with_first_output(output, self.instead[place])
