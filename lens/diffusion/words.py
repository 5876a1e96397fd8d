"""`Words`: the words that a pipeline's text encoders read, as names of the tokens that its denoiser looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention.module_hooks import on
from headwater.lens.diffusion.picture import Axes, words_in
from headwater.lens.naming.measured import Measured
from headwater.lens.records.record import Record
from headwater.lens.running.denoising import CONDITIONAL, UNCONDITIONAL, Now

ENCODERS = (
    ("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"),
)  # fmt: skip
ORDER = (CONDITIONAL, UNCONDITIONAL)  # in which pipelines encode their prompts


class Words:
    """The ids that each text encoder read before a sampling run: the prompt, then what it should not be."""

    def __init__(self, pipeline: Any) -> None:
        parts = {} if pipeline is None else pipeline.components
        self._tokenizers: dict[nn.Module, Any] = {
            parts[encoder]: parts[tokenizer]
            for encoder, tokenizer in ENCODERS
            if isinstance(parts.get(encoder), nn.Module) and parts.get(tokenizer) is not None
        }
        self._coming: dict[nn.Module, list[Tensor]] = {encoder: [] for encoder in self._tokenizers}
        self._read = self._coming

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, what the text encoders read is noted."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.dim() == 2:
                self._coming[module].append(ids.detach().cpu())

        with on(list(self._tokenizers), before=see) if self._tokenizers else contextlib.nullcontext():
            yield

    def begin(self) -> None:
        """A sampling run begins; what was read until now is its prompt."""
        self._read, self._coming = self._coming, {encoder: [] for encoder in self._tokenizers}

    def on(self, record: Record, axes: Any, now: Now, given: Measured) -> Record:
        """The record with the words as the names of its tokens, where they are known."""
        count = words_in(given.more)
        if not isinstance(axes, Axes) or not count:
            return record
        rows = self._rows(now, count, len(given))
        if rows is None:
            return record
        name = record.provenance.get("part") or next(iter(axes.kinds))
        parts = {each: self.on(part, axes, now, given) for each, part in record.parts.items()}
        changed: dict[str, Any] = {"parts": parts}
        if (place := axes.words_at(name, "queries", record.tokens.shape[1], count)) is not None:
            changed["strings"] = _put(record.strings, place, rows)
        if record.keys is not None:
            place = axes.words_at(name, "keys", record.keys.tokens.shape[1], count)
            if place is not None:
                changed["keys"] = record.keys._replace(strings=_put(record.keys.strings, place, rows))
        return replace(record, **changed)

    def _rows(self, now: Now, count: int, batch: int) -> list[list[str]] | None:
        """The words of each row of the batch; None unless the encoders read as many, for every branch."""
        size, rows = batch // len(now.branches), []
        for branch in now.branches:
            which = (
                ORDER.index(branch) if branch in ORDER else 0
            )  # a perturbed run has the words of the prompt
            read = [
                (self._tokenizers[encoder], ids[which])
                for encoder, ids in self._read.items()
                if len(ids) > which
            ]
            chosen = next(
                (
                    some
                    for some in ([read[-1:], read[:1], [*read[:1], *read[2:]]] if read else [])
                    if _length(some) == count
                ),
                None,
            )
            if chosen is None or any(size % len(ids) for _, ids in chosen):
                return None
            texts = [
                [
                    [tokenizer.decode([int(i)]) for i in row]
                    for row in ids.repeat_interleave(size // len(ids), 0)
                ]
                for tokenizer, ids in chosen
            ]
            rows += [[word for part in parts for word in part] for parts in zip(*texts, strict=True)]
        return rows


def _length(read: list[tuple[Any, torch.Tensor]]) -> int:
    return sum(ids.shape[1] for _, ids in read)


def _put(strings: list[list[str]], place: slice, words: list[list[str]]) -> list[list[str]]:
    """The names with words in their place."""
    found = []
    for n, row in enumerate(strings):
        new = list(row)
        new[place] = words[n]
        found.append(new)
    return found
