"""What a head that is no language head gives: logits of classes, of one row, of every token, or of an answer's ends.

A classifier gives [batch, class], a reward model [batch, 1], a token classifier [batch, position, class], a model that
judges every token [batch, position], a model that answers questions [batch, position, 2], the logits of the answer's
start and end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS = ("logits", "logits_per_image", "prediction_logits")
ENDS = ("start_logits", "end_logits")
SPAN = ("start", "end")


def logits_of(out: Any) -> Tensor | None:
    """The logits of an output object of transformers; None if it holds none."""
    found = next((x for x in (getattr(out, n, None) for n in LOGITS) if isinstance(x, Tensor)), None)
    if found is None and all(isinstance(getattr(out, n, None), Tensor) for n in ENDS):
        return torch.stack([getattr(out, n) for n in ENDS], -1)
    return found


def own_similarity(out: Any) -> Tensor | None:
    """The cosine similarity of each text and its own picture (or sound), [row], from the output object of two towers;
    None if it holds no two embeddings of as many rows."""
    sides = [
        x
        for x in (getattr(out, f"{n}_embeds", None) for n in ("text", "image", "audio"))
        if isinstance(x, Tensor)
    ]
    if len(sides) != 2 or sides[0].shape != sides[1].shape:
        return None
    return torch.nn.functional.cosine_similarity(sides[0], sides[1], -1)


def is_span(hf: Any, labels: tuple[str, ...]) -> bool:
    """Whether the classes are the start and the end of an answer, whose probabilities are shared by the positions."""
    return labels == SPAN and tuple((getattr(hf.config, "id2label", None) or {}).values()) != SPAN


def labels_of(hf: Any, out: Any) -> tuple[str, ...]:
    """The names of the classes that `out` holds logits of: the configuration's, else their numbers; () without any."""
    found = logits_of(out)
    if found is None or getattr(out, "logits_per_image", None) is not None or hf.get_output_embeddings():
        return ()
    if not isinstance(getattr(out, "logits", None), Tensor):
        return SPAN
    per_token = found.dim() == 2 and found.shape[1] != getattr(hf.config, "num_labels", found.shape[1])
    count = 1 if per_token else found.shape[-1]
    named = getattr(hf.config, "id2label", None) or {}
    if len(named) != count or sorted(map(int, named)) != list(range(count)):
        return tuple(map(str, range(count)))
    return tuple(str(named[n] if n in named else named[str(n)]) for n in range(count))
