"""`attention_divergence`: how far the maps of one record are from those of another, with gradients if they have some.

A student learns its teacher's attention from it (attention transfer: "distil").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.block import Block
from headwater.lens.errors import RecordError
from headwater.lens.naming.heads import Head, HeadNames, every_head, named
from headwater.lens.records.record import Record

How = Literal["cross_entropy", "kl", "js"]
HOW = ("cross_entropy", "kl", "js")


def attention_divergence(
    teacher: Record,
    student: Record,
    heads: HeadNames | Mapping[str, str] | None = None,
    how: How = "cross_entropy",
) -> Float[Tensor, "batch pair"]:
    """The mean over real rows of the divergence of two maps, [batch, pair], in nats; a pair is two heads.

    `heads`: None, every head with its namesake; names "layer.head" of some; or {head of the student: head of the
    teacher}, where layers or heads differ. Of a row t of the teacher and s of the student "cross_entropy" is
    -Σ t ln s, "kl" the same less the entropy of t, "js" the Jensen–Shannon divergence (at most ln 2). Gradients go to
    the records that were made with `grad=True`. A weight that the student can not give, because its key is hidden,
    counts as the smallest number that float32 holds. RecordError for records of different lengths or padding,
    or without maps; that both read the same is not checked.

    Source: Li et al. 2024, arXiv:2411.09702 (attention transfer: "distil" is the task loss and λ times the mean of
    the cross-entropy; formulas from memory). "copy" is `FreezeAttention(teacher)` on the student.

    >>> import headwater as hw
    >>> model, text = hw.load("tasks-4l"), "Mary gave John a drink"
    >>> teacher = model.record(text)
    >>> with model.edit(hw.Temperature(2.0)):
    ...     student = model.record(text, grad=True, statistics=())
    >>> loss = hw.attention_divergence(teacher, student, how="kl").mean()
    >>> bool(loss > 0), loss.requires_grad
    (True, True)
    """
    if how not in HOW:
        raise RecordError(f"how is one of {', '.join(HOW)}; got {how!r}")
    for name, given in {"teacher": teacher, "student": student}.items():
        if not isinstance(given, Record):
            raise RecordError(f"the {name} is a record, as model.record gives it; got {type(given).__name__}")
    pairs = _pairs(teacher, student, heads)
    found: dict[int, Tensor] = {}
    real = student.valid.sum(1).clamp_min(1)
    for layers in dict.fromkeys((own.layer, other.layer) for own, other in pairs):
        s, t = student.map(layers[0]), teacher.map(layers[1])
        if (s.shape[0], *s.shape[2:]) != (t.shape[0], *t.shape[2:]):
            raise RecordError(
                f"the student's maps of layer {layers[0]} are {_size(s)} and the teacher's of layer {layers[1]} "
                f"{_size(t)} (rows × queries × keys); record the same inputs with both"
            )
        if s.shape[2] == teacher.valid.shape[1] and not teacher.valid.equal(
            student.valid.to(teacher.valid.device)
        ):
            raise RecordError(
                "teacher and student are padded at different places; record the same inputs with both"
            )
        here = [n for n, (own, other) in enumerate(pairs) if (own.layer, other.layer) == layers]
        mine, theirs = ([pairs[n][side].head for n in here] for side in (0, 1))
        sums = torch.zeros(s.shape[0], len(here), device=s.q.device)
        for rows, weights in s.row_blocks(mine):
            target = t.tile(rows, slice(0, t.shape[3]), theirs).to(weights.device)
            sums = sums + _of_rows(target, weights, _logs(s, rows, mine), how)
        found |= dict(zip(here, (sums / real[:, None].to(sums.device)).unbind(1), strict=True))
    return torch.stack([found[n] for n in range(len(pairs))], 1)


def _pairs(
    teacher: Record, student: Record, heads: HeadNames | Mapping[str, str] | None
) -> list[tuple[Head, Head]]:
    """(head of the student, head of the teacher) of each pair."""
    if heads is None:
        if (teacher.layers, teacher.n_heads) != (student.layers, student.n_heads):
            raise RecordError(
                f"the teacher has layers {teacher.layers} with {teacher.n_heads} heads and the student layers "
                f"{student.layers} with {student.n_heads}; say which head learns from which: heads={{'0.0': '1.0'}}"
            )
        given = {head: head for head in every_head(student.layers, student.n_heads)}
    elif isinstance(heads, Mapping):
        given = dict(heads)
    else:
        try:
            given = {
                head: head for head in (heads.replace(",", " ").split() if isinstance(heads, str) else heads)
            }
        except TypeError:
            raise RecordError(
                f"heads are names 'layer.head', or {{student's: teacher's}}; got {heads!r:.60}"
            ) from None
    if not given:
        raise RecordError("heads is empty; name at least one head")
    own = named(list(given), student.layers, student.n_heads, "the student")
    theirs = [named([head], teacher.layers, teacher.n_heads, "the teacher")[0] for head in given.values()]
    return list(zip(own, theirs, strict=True))


def _logs(map: AttentionMap, rows: slice, heads: list[int]) -> Tensor | None:
    """Logarithms of the weights of some rows, from the scores; None where only the weights are known."""
    if map.steps or map.rule.normaliser is not None:
        return None
    block = Block(slice(0, map.shape[0]), torch.tensor(heads), rows, slice(0, map.shape[3]))
    return map.log_weights(block)


def _of_rows(t: Tensor, s: Tensor, logs: Tensor | None, how: How) -> Tensor:
    """The divergence summed over rows [batch, head, row, key], [batch, head]."""
    least = torch.finfo(torch.float32).tiny
    floor = torch.tensor(least, device=s.device).log()
    logs = s.clamp_min(least).log() if logs is None else torch.where(logs.isneginf(), floor, logs)
    entropy = -(t * t.clamp_min(least).log()).sum((2, 3))
    if how == "js":
        mean = ((t + s) / 2).clamp_min(least)
        return -(mean * mean.log()).sum((2, 3)) - (entropy - (s * logs).sum((2, 3))) / 2
    crossed = -(t * logs).sum((2, 3))
    return crossed - entropy if how == "kl" else crossed


def _size(map: AttentionMap) -> str:
    batch, _, queries, keys = map.shape
    return f"{batch} × {queries} × {keys}"
