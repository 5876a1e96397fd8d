"""Multi-query associative recall: key–value pairs, then some keys again, each to be answered by its value.

The generator of Arora et al. 2023 (Zoology, arXiv 2312.04927), after the authors' code: slots of the questions follow a
power law, other places hold random tokens. It also says where a head that recalls must look, which no text tells.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LABEL = -100


@dataclass(frozen=True)
class Recall:
    """`ids` and `labels` [text, position] (labels NO_LABEL where nothing is asked), and `looks` [text, position]: the
    column of the value that answers the question at that position, -1 elsewhere."""

    ids: Tensor
    labels: Tensor
    looks: Tensor


def mqar(
    count: int, length: int = 64, pairs: int = 4, vocabulary: int = 64, power: float = 0.01, seed: int = 0,
    offset: int = 0,
) -> Recall:  # fmt: skip
    """`count` texts. Keys are ids from 1 to vocabulary/2 - 1, values from vocabulary/2; `offset` is added to all ids.

    `length` is even and at least 4·pairs; a random token that is a key would be a question without a label, so fillers
    are drawn from the values. (The authors' code draws them from the whole vocabulary.)
    """
    if length % 2 or 4 * pairs > length:
        raise ValueError(f"length must be even and at least 4·pairs = {4 * pairs}; got {length}")
    if pairs >= vocabulary // 2:
        raise ValueError(f"{pairs} pairs need a vocabulary of more than {2 * pairs + 1}; got {vocabulary}")
    rng = random.Random(f"mqar {seed}")
    slots = range(1, (length - 2 * pairs) // 2)
    chance = [power * slot ** (power - 1) for slot in slots]
    ids = torch.zeros(count, length, dtype=torch.long)
    labels, looks = torch.full_like(ids, NO_LABEL), torch.full_like(ids, -1)
    for row in range(count):
        keys = rng.sample(range(1, vocabulary // 2), pairs)
        values = rng.sample(range(vocabulary // 2, vocabulary), pairs)
        ids[row] = torch.tensor([rng.randrange(vocabulary // 2, vocabulary) for _ in range(length)])
        for place, (key, value, gap) in enumerate(
            zip(keys, values, _draw(rng, slots, chance, pairs), strict=True)
        ):
            ids[row, 2 * place], ids[row, 2 * place + 1] = key, value
            asked = 2 * pairs + 2 * gap
            ids[row, asked], labels[row, asked], looks[row, asked] = key, value, 2 * place + 1
    return Recall(ids + offset, torch.where(labels == NO_LABEL, labels, labels + offset), looks)


def _draw(rng: random.Random, slots: range, chance: list[float], pairs: int) -> list[int]:
    """`pairs` different slots, each drawn with its chance among those left."""
    left, weights, drawn = list(slots), list(chance), []
    for _ in range(pairs):
        index = rng.choices(range(len(left)), weights)[0]
        drawn.append(left.pop(index))
        weights.pop(index)
    return drawn
