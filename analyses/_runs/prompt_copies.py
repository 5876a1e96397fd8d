"""Forward passes over copies of the prompts of some pairs, restricted to what a change can reach and the measure reads.

A run starts at the changed layer (`resume_at_layer`) and, in a causal model, at the first changed position; keys and
values of earlier positions come from the unchanged prompts. Positions after the one that is read are left out, and the
language head computes only the logits that are read. Each shortcut is first tried on the unchanged prompts. A model
whose logits then differ, or that has edits, runs in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwater.analyses._measures.pair_scores import Asked, How, Told
from headwater.analyses._prompts.examples import Batch, joined, queries_of
from headwater.analyses._prompts.pairs import Pairs
from headwater.analyses._runs.replace_activations import Swap, narrow_head
from headwater.analyses._runs.resume_at_layer import TRIED, Resuming, foreign, listened, mapped
from headwater.lens.attention import context
from headwater.lens.attention.standing_in import runs_itself
from headwater.lens.model import HookedModel
from headwater.lens.running import prefix_cache
from headwater.lens.running.forward import check_ready
from headwater.lens.transformer_lens.run import Stop

ROWS = 1024  # tokens of all copies in one run
KEYS = 16_384  # keys of all copies in one run


@dataclass(frozen=True, eq=False)
class Copies:
    """`ids` [pair, position] of the prompts that are changed. Only changes from `first` to before `stop` have an
    effect.

    `past`: keys and values by layer, empty where a run cannot start in the middle. `logits`: of the unchanged prompts.
    `tokens`: the tokens whose logits the head computes, None for all.
    """

    model: HookedModel
    ids: Tensor
    told: Told
    first: int
    stop: int
    logits: Tensor
    resuming: Resuming
    past: prefix_cache.KeysValues
    tokens: Tensor | None

    @classmethod
    def of(
        cls, model: HookedModel, pairs: Pairs, asked: Asked, how: How,
        keep: Collection[str] = (), parts: Collection[int] = (),
    ) -> tuple[Copies, Swap]:  # fmt: skip
        """Run both prompts of each pair once, those that are changed in the first half of the rows. Also return the
        run.
        """
        base, other = (pairs.corrupt, pairs.clean) if how == "denoise" else (pairs.clean, pairs.corrupt)
        plainly = (
            model.causal
            and not pairs.beside
            and not context.active(model.key)
            and context.current_gates(model.key) is None
        )
        for side in (base, other):
            check_ready(model, model.to_tokens(side))
        place, count = asked.place(model, pairs), len(base)
        seen = Swap(model, 2 * count, keep=keep, parts=parts)
        cache = prefix_cache.empty(model) if plainly else None
        with listened(model) as outputs:
            found = seen.logits(joined([base, other]), place, cache)
        halves = (found[count:], found[:count]) if how == "denoise" else (found[:count], found[count:])
        told = asked.told(model, pairs, *halves)
        head = narrow_head(model)

        def base_rows(tensor: Tensor) -> Tensor:
            return tensor[: len(tensor) // 2] if len(tensor) % (2 * count) == 0 else tensor

        made = cls(
            model, base, told,
            first=pairs.first if plainly else 0,
            stop=place + 1 if plainly and place is not None else pairs.positions(model),
            logits=found[:count],
            resuming=Resuming(model.layers, {block: mapped(out, base_rows) for block, out in outputs.items()}),
            past=prefix_cache.filled(cache, count, pairs.length),
            tokens=told.tokens if head is not None and runs_itself(head) and not foreign(head) else None,
        )  # fmt: skip
        return made._tried(), seen

    def _tried(self) -> Copies:
        """Drop each shortcut that does not reproduce the logits of the unchanged prompts."""
        layers, some = self.model.layers, replace(self, tokens=None)
        found = next((c for c in (self, some) if c._holds(layers[0], self.stop // 2)), replace(some, past=[]))
        rows = queries_of(self.model, self.ids).shape
        by_position = all(_has_positions(output, rows) for output in self.resuming.outputs.values())
        if by_position and not found._holds(layers[-1], self.stop // 2):
            return replace(found, resuming=Resuming(layers))
        return found if by_position else replace(found, past=[])

    def _holds(self, layer: int, start: int) -> bool:
        """Whether a run from `layer` and `start` reproduces the logits of the unchanged prompts up to rounding."""
        try:
            found = self._logits(Swap(self.model, TRIED * len(self.ids)), TRIED, layer, start)
        except Exception:  # transformers has no error of its own for models that cannot start in the middle
            return False
        expected = self.logits.repeat(TRIED, *[1] * (self.logits.dim() - 1))
        if self.tokens is not None and found.shape != expected.shape:
            expected = expected[..., self.tokens]
        near = torch.finfo(expected.dtype).eps ** 0.5 * self.logits.abs().max()
        return found.shape == expected.shape and bool((found - expected).abs().max() <= near)

    def window(self, start: int) -> slice:
        """The positions that a run computes if nothing before `start` changes."""
        return slice(start, self.stop) if self.past else slice(0, queries_of(self.model, self.ids).shape[1])

    def fitting(self, start: int) -> int:
        """The number of copies in one run from `start`."""
        window, pairs = self.window(start), len(self.ids)
        return max(min(ROWS // (pairs * (window.stop - window.start)), KEYS // (pairs * window.stop)), 1)

    def measure(self, swap: Swap, copies: int, layer: int, start: int) -> Tensor:
        """[copy, pair] in float64, of a run in which nothing changes below `layer` and before `start`."""
        return self.told.of(self._run(swap, copies, layer, start), copies)

    def reach(self, swap: Swap, copies: int, layer: int, start: int) -> None:
        """Run as for `measure` up to the activation where `swap` stops."""
        with contextlib.suppress(Stop):
            self._run(swap, copies, layer, start)

    def _run(self, swap: Swap, copies: int, layer: int, start: int) -> Tensor:
        if layer not in self.resuming.tried:
            whole = not self.resuming.outputs or layer == self.model.layers[0]
            self.resuming.tried[layer] = whole or self._holds(layer, start)
        return self._logits(
            swap, copies, layer if self.resuming.tried[layer] else self.model.layers[0], start
        )

    def _logits(self, swap: Swap, copies: int, layer: int, start: int) -> Tensor:
        window, place = self.window(start), self.told.position
        past = prefix_cache.before(self.past, window.start) if window.start else None
        ids = self.ids[:, window] if self.past else self.ids
        rows = Batch(ids, list(range(len(ids)))).copies(copies).ids
        with self.resuming.before(layer, copies, window if self.past else None):
            found = swap.logits(rows, None if place is None else place - window.start, past, self.tokens)
        if place is None and window.start:
            found = torch.cat([self.logits[:, : window.start].repeat(copies, 1, 1), found], 1)
        return found


def _has_positions(output: Any, shape: torch.Size) -> bool:
    if isinstance(output, tuple):
        return all(_has_positions(part, shape) for part in output)
    return not isinstance(output, Tensor) or output.shape[:2] == shape
