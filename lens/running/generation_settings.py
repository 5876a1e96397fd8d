"""Settings of generation, from the caller or from a model's folder: the memory that they ask for, and their faults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from headwater.lens.errors import HeadwaterError, PromptError, named_line
from headwater.lens.models.opened import Opened
from headwater.lens.records.free_memory import free_memory

AT_ONCE = ("num_beams", "num_return_sequences")  # each follows so many texts for one
OF_SETTINGS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, OverflowError, RuntimeError
)  # fmt: skip
COPIES = 4  # of the scores of a step: raw, processed, of all beams, sorted


def check(model: Opened, rows: int, settings: Mapping[str, Any]) -> None:
    """PromptError for ends that are no tokens, and where so many texts are followed at once that their scores alone do
    not fit into memory."""
    given = {
        name: settings.get(name, getattr(model.hf.generation_config, name, None)) or 1 for name in AT_ONCE
    }
    for name, count in given.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PromptError(f"{name} is a whole number of at least 1; got {count!r:.40}")
    ends = settings.get("eos_token_id", getattr(model.hf.generation_config, "eos_token_id", None))
    if not all(type(each) is int for each in (ends if isinstance(ends, list) else [ends or 0])):
        raise PromptError(f"eos_token_id is a token's id or a list of them; got {ends!r:.40}")
    needed, free = rows * max(given.values()) * (model.vocab or 1) * 4 * COPIES, free_memory()
    if needed > free:
        name = max(given, key=lambda name: given[name])
        raise PromptError(
            f"{name}={given[name]} follows so many texts that their scores take {needed / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free: give a smaller one"
        )


@contextlib.contextmanager
def told_in_a_line(model: Opened, raised: list[Exception]) -> Iterator[None]:
    """What transformers says of settings that make no sense, as PromptError; `raised` are faults of the caller's own
    function, which stay as they are."""
    try:
        yield
    except OF_SETTINGS as error:
        if isinstance(error, HeadwaterError | torch.OutOfMemoryError) or error in raised:
            raise
        raise PromptError(
            f"{model.name} can not generate with these settings: {named_line(error):.300}"
        ) from error
