"""`HeadMix`: each head takes a mixture of all heads' scores or weights, or of its scores at neighbouring pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import HeadWise, LayerCall, Prepared, Rows, singles
from headwater.lens.edits.named_positions import NO_GROUPS
from headwater.lens.errors import EditError
from headwater.lens.models.opened import Opened
from headwater.lens.naming.heads import Heads, Layers

__all__ = ["HeadMix"]

SUMS = 1e-6  # a mixture of weights whose numbers sum to 1 within this keeps the sums of rows
MOST_TAPS = 65  # of a convolution along each axis


class Mixtures(NamedTuple):
    """The checked numbers of the edit: [head, head], [head, back, wide]; None where there is none."""

    pre: Tensor | None
    post: Tensor | None
    convolution: Tensor | None


@dataclass(frozen=True, eq=False)
class HeadMix(HeadWise):
    """Mix heads: s_g → Σ_h pre[g, h]·s_h before the softmax, P_g → Σ_h post[g, h]·P_h behind it.

    `pre` and `post` are numbers [head, head], by the new head, then the old: talking heads (Shazeer et al. 2020). With
    `convolution`, [back, wide] or [head, back, wide], scores are first convolved as in multi-token attention (Golovneva
    et al. 2025): s_ij → Σ_ab convolution[a, b]·s_(i-a)(j+c-b), where c = (wide - 1) // 2 and hidden pairs count as 0.
    Its queries must all be there: `back` above 1 is refused in generation with a cache. None leaves a step out. `heads`
    are the new heads; the others stay as they are. Rows sum to what `post` makes of them: nothing is renormalised.

    >>> import headwater as hw
    >>> import torch
    >>> model = hw.load("tasks-4l")
    >>> mean = torch.full((8, 8), 1 / 8)
    >>> with model.edit(hw.HeadMix(post=mean, layers=1)):  # every head of layer 1 takes the mean of all
    ...     found = model.record("Mary gave John a drink").pattern(1)[0]
    >>> bool((found[0] - found[7]).abs().max() < 1e-6)
    True
    """

    pre: Any = None
    post: Any = None
    convolution: Any = None
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    @property
    def row_sums(self) -> str:  # type: ignore[override]
        post = None if self.post is None else np.asarray(self._plain("post"), dtype=np.float64)
        kept = post is None or np.abs(post.sum(-1) - 1).max() <= SUMS
        return "" if kept else "the weights of a row do not sum to 1 under HeadMix"

    def _is_neutral(self) -> bool:
        return self.pre is None and self.post is None and self.convolution is None

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        n = model.n_heads
        pre, post = (
            None if given is None else _numbers(given, name, f"[{n} heads, {n} heads]", (2,), (n, n))
            for name, given in (("pre", self.pre), ("post", self.post))
        )
        taps = None
        if self.convolution is not None:
            taps = _numbers(
                self.convolution, "convolution", f"[back, wide] or [{n} heads, back, wide]", (2, 3)
            )
            taps = taps.expand(n, -1, -1) if taps.dim() == 2 else taps
            if len(taps) != n or max(taps.shape[1:]) > MOST_TAPS:
                raise EditError(
                    f"HeadMix: convolution is [back, wide] or [{n} heads, back, wide], at most {MOST_TAPS} each; "
                    f"got {list(taps.shape)}"
                )
        prepared = super().prepare(model, groups)
        return replace(prepared, values=dict.fromkeys(prepared.heads, Mixtures(pre, post, taps)))

    def _lower(self, call: LayerCall) -> Lowered:
        pre, post, taps = call.values
        chosen = call.heads[..., None]
        scores: list[ConvolveScores | MixHeads] = []
        if taps is not None:
            back, wide = taps.shape[1:]
            if back > 1 and call.mask.query_offset:
                raise EditError(
                    f"HeadMix: a convolution over {back} queries needs all queries, and a cache keeps none; generate "
                    "with use_cache=False"
                )
            ahead = (wide - 1) // 2
            own = torch.zeros(back, wide).index_put((torch.tensor(0), torch.tensor(ahead)), torch.ones(()))
            scores.append(ConvolveScores(torch.where(chosen[..., None], taps, own), ahead))
        eye = torch.eye(call.heads.shape[-1])
        if pre is not None:
            scores.append(MixHeads(torch.where(chosen, pre, eye)))
        weights = () if post is None else (MixHeads(torch.where(chosen, post, eye)),)
        return Lowered(scores=tuple(scores), weights=weights)


def _numbers(
    given: Any, name: str, wanted: str, axes: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> Tensor:
    """The numbers as float32; EditError for another shape, NaN or infinity."""
    try:
        array = singles(given)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim not in axes or 0 in array.shape or (shape is not None and array.shape != shape):
        raise EditError(
            f"HeadMix: {name} is {wanted}; got {list(array.shape) if array.size else given!r:.60}"
        )
    if not np.isfinite(array).all():
        raise EditError(f"HeadMix: {name} holds NaN or infinite numbers")
    return torch.from_numpy(array.copy())
