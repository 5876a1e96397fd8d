"""Runs behind a text whose keys are evicted: it is read once and whole, and what follows sees the keys that were kept.

Which keys a way keeps is said by the scores of `kv_scores`, for each key–value head by itself, as released methods do.
Evicted keys are hidden from every later query in every layer, so that what follows is computed as from a cache without
them; the others keep their positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._runs.replace_activations import Swap
from headwater.kernels.edits.scores import MaskScores
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import ActiveEdit, Lowered
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.running import prefix_cache

FIRST_STAGE = 0.5  # of the keys that CriticalKV keeps, chosen by the plain score, as released
RULES = ("observed", "windowed", "expected", "critical", "recent")
WAYS = (*RULES, "random")

Kept = Annotated[str, "shares of the keys that are kept, with commas between"]
Draws = Annotated[int, "random choices of keys, whose loss is a mean", Bounds(1)]


@dataclass(frozen=True, eq=False)
class _Evicted(ActiveEdit):
    """Hides keys of the first part from the queries behind it; `kept` bool [text, head, key] by layer."""

    kept: dict[int, Tensor]

    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        kept = self.kept[layer]
        length = kept.shape[-1]

        def visible(text: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            there = kept.to(key.device)[text, head, key.clamp_max(length - 1)]
            return there | (key >= length) | (query < length)

        return Lowered(scores=(MaskScores(torch.ones(kept.shape[1], dtype=torch.bool), visible),))


@dataclass(frozen=True, eq=False)
class Behind:
    """Texts `ids` [text, position], of which the first `length` tokens were read: `known` are their keys and values, []
    where the model carries more than these from token to token and reads them again in every run."""

    model: HookedModel
    ids: Tensor
    length: int
    known: prefix_cache.KeysValues = field(default_factory=list)

    @classmethod
    def of(cls, model: HookedModel, ids: Tensor, length: int) -> Behind:
        cache = prefix_cache.empty(model)
        if cache is None:
            return cls(model, ids, length)
        Swap(model, len(ids)).logits(ids[:, :length], length - 1, cache)
        return cls(model, ids, length, prefix_cache.filled(cache, len(ids), length))

    def loss(self, kept: Tensor | None = None) -> Tensor:
        """Nats [row, token] of each token of the second part but its first, which the first part tells.

        `kept` bool [row, layer, kv_head, key] are rows of all texts, once or more; None: all keys are kept.
        """
        return -self._chances(kept)[0]

    def told(self, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss, and whether the token is the likeliest, both [row, token]."""
        chances, best = self._chances(kept)
        return -chances, chances == best

    def _chances(self, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """ln p of each token and of the likeliest one."""
        rows = len(self.ids) if kept is None else len(kept)
        ids = self.ids.repeat(rows // len(self.ids), 1)
        start = self.length if self.known else 0
        past = prefix_cache.before(self.known, start) if self.known else None
        swap = Swap(self.model, rows)
        if kept is None:
            logits = swap.logits(ids[:, start:], None, past)
        else:
            groups = self.model.n_heads // self.model.n_kv_heads
            per_layer = kept.repeat_interleave(groups, 2).unbind(1)
            with self.model.acting([_Evicted(dict(zip(self.model.layers, per_layer, strict=True)))]):
                logits = swap.logits(ids[:, start:], None, past)
        logits = logits[:, self.length - start : -1].double().log_softmax(-1)
        told = ids[:, self.length + 1 :, None].to(logits.device)
        return logits.gather(-1, told)[..., 0].cpu(), logits.amax(-1).cpu()


def shares_of(given: str) -> list[float]:
    """The shares in a setting. AnalysisError for others than above 0 and up to 1."""
    try:
        found = [float(each) for each in given.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 < each <= 1 for each in found):
        raise AnalysisError(f"kept={given!r}: give shares above 0 and up to 1, such as '0.1, 0.5'")
    return found


def count_of(share: float, length: int) -> int:
    """How many of `length` keys a share is, rounded down as released methods do."""
    return int(share * length + 1e-9)


def refuse_few(shares: list[float], length: int, window: int, sinks: int) -> None:
    """AnalysisError where a share is less than what a method always keeps."""
    for share in shares:
        if count_of(share, length) < max(window, sinks, 1):
            raise AnalysisError(
                f"kept={share:g} of {length} keys is less than window={window} or sinks={sinks}, which are always "
                "kept; give a longer text, a larger share, or less of both"
            )


def kept_by(
    scores: xr.Dataset, count: int, draws: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Each way with the `count` keys that it keeps, bool [text, layer, kv_head, key]; "random" comes `draws` times."""
    for rule in RULES:
        yield rule, _largest(_ranks(scores, rule, count), count)
    for _ in range(draws):
        shape = scores.value_norm.shape
        yield "random", _largest(torch.rand(shape, generator=generator, dtype=torch.float64), count)


def _ranks(scores: xr.Dataset, rule: str, count: int) -> Tensor:
    """What the largest are kept of; infinite at keys that are always kept."""
    if rule == "recent":
        shape = scores.value_norm.shape
        return torch.arange(shape[-1]).double().expand(shape)
    if rule == "critical":
        plain = _largest(_ranks(scores, "windowed", count), int(FIRST_STAGE * count))
        return _known(scores.by_output, "windowed").masked_fill(plain, torch.inf)
    return _known(scores.by_value if rule == "expected" else scores.score, rule)


def _known(values: xr.DataArray, by: str) -> Tensor:
    return torch.from_numpy(values.sel(by=by).values).nan_to_num(nan=torch.inf)


def _largest(ranks: Tensor, count: int) -> Tensor:
    return torch.zeros(ranks.shape, dtype=torch.bool).scatter_(-1, ranks.topk(count, -1).indices, True)
