"""Runs of one needle test: the text is read once, and the answer is written from its keys and values many times.

A run of the question and of what was written behind it starts at the cached text, in copies with other heads off. No
map of the text is made: the rows that are read are those of the question and of the written tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwater.analyses._prompts.needles import Needle
from headwater.analyses._runs.replace_activations import Swap
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.model import HookedModel
from headwater.lens.running import prefix_cache
from headwater.lens.running.forward import check_ready

KEYS = 2**15  # keys of all copies in one run


@dataclass(frozen=True, eq=False)
class Rows:
    """Of the last rows of a run: `top` int [layer, head, row], the key with the largest weight, and `mass`, the weight
    on the needle's keys in float64."""

    top: Tensor
    mass: Tensor


@dataclass(frozen=True, eq=False)
class NeedleRun:
    """The model, the test, and keys and values of all but the last token; [] where the model has no such cache."""

    model: HookedModel
    test: Needle
    known: prefix_cache.KeysValues = field(default_factory=list)

    @classmethod
    def of(cls, model: HookedModel, test: Needle) -> NeedleRun:
        """Read the text. AnalysisError where the answer does not fit behind it."""
        test.fits(model)
        check_ready(model, model.to_tokens(test.ids), test.answer.stop - test.answer.start)
        before = test.ids[:, :-1]
        cache = prefix_cache.empty(model)
        if cache is None:
            return cls(model, test)
        Swap(model, 1).logits(before, before.shape[1] - 1, cache)
        return cls(model, test, prefix_cache.filled(cache, 1, before.shape[1]))

    def written(self, count: int, gates: Tensor | None = None) -> Tensor:
        """The `count` tokens that the model writes, the likeliest each time, [copy, count].

        `gates` [copy, layer, head] are on while it writes; the text was read without them.
        """
        copies = 1 if gates is None else len(gates)
        found = []
        for rows in self._pieces(copies, count):
            some = None if gates is None else gates[rows]
            found.append(self._continued(count, len(rows), some))
        return torch.cat(found)

    def answer_loss(self, gates: Tensor) -> Tensor:
        """Nats per token of the right answer, [copy]."""
        answer = self.test.ids[0, self.test.answer]
        ids = torch.cat([self.test.ids[0], answer[:-1]])
        found = []
        for rows in self._pieces(len(gates), len(answer)):
            logits = self._run(ids.expand(len(rows), -1), self.test.ids.shape[1] - 1, gates[rows], every=True)
            told = logits[:, -len(answer) :].double().cpu().log_softmax(-1)
            found.append(-told.gather(-1, answer.expand(len(rows), -1)[..., None])[..., 0].mean(-1))
        return torch.cat(found)

    def rows(self, written: Tensor) -> Rows:
        """The rows from the question's first token to the one that gave the last written token."""
        first = self.test.question.start
        listener = _Reading(self.model.key, self.test.needle, 0 if self.known else first)
        ids = torch.cat([self.test.ids, written[None, :-1]], 1)
        with context.listening(listener):
            self._run(ids, first, None, every=False)
        layers = [listener.found[layer] for layer in self.model.layers]
        return Rows(*(torch.stack(side) for side in zip(*layers, strict=True)))

    def _continued(self, count: int, copies: int, gates: Tensor | None) -> Tensor:
        """`written` for copies that run together; only the newest token runs where there is a cache."""
        past = prefix_cache.growing(self.known, copies, count) if self.known else None
        token = self.test.ids[:, -1:].expand(copies, -1)
        found = [] if past is not None else [self.test.ids.expand(copies, -1)]
        for _ in range(count):
            ids = token if past is not None else torch.cat(found, 1)
            token = self._gated(ids, ids.shape[1] - 1, past, gates)[:, -1:].argmax(-1).cpu()
            found.append(token)
        return torch.cat(found[-count:], 1)

    def _pieces(self, copies: int, more: int) -> Sequence[Tensor]:
        """The copies, so many at once as memory is meant for."""
        return torch.arange(copies).split(max(KEYS // (self.test.ids.shape[1] + more), 1))

    def _run(self, ids: Tensor, start: int, gates: Tensor | None, every: bool) -> Tensor:
        start = start if self.known else 0
        past = prefix_cache.before(self.known, start) if self.known else None
        return self._gated(ids[:, start:], None if every else ids.shape[1] - start - 1, past, gates)

    def _gated(
        self, ids: Tensor, place: int | None, past: prefix_cache.Cache | None, gates: Tensor | None
    ) -> Tensor:
        swap = Swap(self.model, len(ids))
        if gates is None:
            return swap.logits(ids, place, past)
        on = context.current_gates(self.model.key)
        if on is not None:
            gates = gates.to(on) * on if on.dim() == 3 else gates.to(on)[..., None] * on
        with context.gated(self.model.key, gates.to(self.model.device)):
            return swap.logits(ids, place, past)


class _Reading:
    """Listener that keeps the largest key and the mass on the needle of every row from the question on."""

    grad = False
    statistics: tuple[str, ...] = ()

    def __init__(self, model: object, needle: slice, skip: int) -> None:
        self.model, self.needle, self.skip = model, needle, skip
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        offset = map.rule.mask.key_offset
        weights = map.tile(slice(self.skip, map.shape[2]), slice(0, map.shape[3]))[0].double().cpu()
        needle = slice(max(self.needle.start - offset, 0), max(self.needle.stop - offset, 0))
        self.found[layer] = weights.argmax(-1) + offset, weights[..., needle].sum(-1)
