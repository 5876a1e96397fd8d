"""The rules that define sinks: for edits ("sinks:share:0.3", "sinks:act:5", "sinks:massive:20"), recipes and
`analyses.find_sinks`.

`share` and `act` compare `α_j = Σ_i A_ij / #{i that see j}` of a head with a threshold. `share`: a fixed one (0.3, Gu
et al., ICLR 2025). `act`: `alpha / N` for N real tokens (alpha 5), without the first sink of each head, which the
authors take for the initial token (ACT, Yu et al., ICML 2024; detection checked against their code, the threshold
against the text). `massive`: a token is a sink of all heads of a layer if, in the stream entering the layer, one of a
few dimensions is above tau times the root mean square (VAR, Kang et al., ICLR 2025; checked against their code).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from headwater.lens.records.record import Record

SHARE = 0.3
ALPHA = 5.0
TAU = 20.0
MOST_DIMENSIONS = 8
QUARTER = 0.25  # of the queries that see the best seen token of a head, for rules of a fixed share


def needs(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(statistics, keep) of a record on which `find` can find these sinks."""
    rules = {name.split(":")[1] for name in names}
    return ("received", "visible") if rules - {"massive"} else (), ("residual",) if "massive" in rules else ()


def find(record: Record, name: str) -> Bool[Tensor, "batch layer head position"]:
    """The sinks of every head by a rule, bool [batch, layer, head, position], from a record with what `needs` says."""
    _, rule, *given = name.split(":")
    if rule == "massive":
        tau = float(given[0]) if given else TAU
        sink = (massive_scores(record, first_dimensions(record, tau)) > tau) & record.valid[:, None].cpu()
        return sink[:, :, None].expand(-1, -1, record.n_heads, -1)
    share = shares(record, rule)
    if rule == "share":
        return share > (float(given[0]) if given else SHARE)
    tokens = record.key_axis.valid.sum(-1)[:, None, None, None]
    return without_first(share > (float(given[0]) if given else ALPHA) / tokens)


def shares(record: Record, rule: str = "share") -> Float[Tensor, "batch layer head position"]:
    """α of every head; NaN where too few queries see the key, by `rule`."""
    received, visible = (torch.as_tensor(record.statistic(s).values) for s in ("received", "visible"))
    return torch.where(seen_enough(visible, rule), received / visible, torch.nan)


def seen_enough(
    visible: Shaped[Tensor, "*rows key"], rule: str, least: int | None = None
) -> Bool[Tensor, "*rows key"]:
    """Which keys so many queries see that their share is compared: `least`, or what the rule asks for.

    A share of few weights says little: the last token of a causal text has one, its weight on itself. So the rules of
    a fixed share, "share" and "gu", ask for a quarter of the queries that see the head's best seen key; others for one.
    """
    if least is not None:
        return visible >= least
    return visible >= (QUARTER * visible.amax(-1, keepdim=True) if rule in ("share", "gu") else 1)


def without_first(sink: Bool[Tensor, "*rows position"]) -> Bool[Tensor, "*rows position"]:
    """Sinks [..., position] without the first one of each row."""
    return sink & (sink.long().cumsum(-1) > 1)


def relative(x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """`|x_d| / sqrt(mean_d x_d² + 1e-6)` over the last axis, in float32."""
    x = x.float()
    return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs()


def massive(stream: Float[Tensor, "*rows d_model"], dimensions: Sequence[int]) -> Float[Tensor, "*rows"]:
    """`max_{d in dimensions} |x_d| / rms(x)` of a stream; 0 without dimensions."""
    if not len(dimensions):
        return stream.new_zeros(stream.shape[:-1], dtype=torch.float32)
    return relative(stream)[..., list(dimensions)].amax(-1)


def massive_scores(record: Record, dimensions: Sequence[int]) -> Float[Tensor, "batch layer position"]:
    """`massive` of the stream entering each recorded layer."""
    return torch.stack([massive(record.residual(layer), dimensions).cpu() for layer in record.layers], 1)


def first_dimensions(record: Record, tau: float = TAU) -> list[int]:
    """The dimensions that are massive on the first token of any text in the record, in its middle layers."""
    first = record.valid.long().argmax(1)
    rows = torch.arange(len(first))
    tokens = [record.residual(layer)[rows, first].float().cpu() for layer in record.layers]
    return massive_dimensions(massive_sizes(torch.stack(tokens)).amax(0), tau)


def massive_sizes(first: Float[Tensor, "layer *rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """The largest |x_d| / rms(x) over the middle layers; `first` is the stream of a first token at every layer."""
    start = len(first) // 4
    return relative(first[start : max(3 * len(first) // 4, start + 1)]).amax(0)


def massive_dimensions(sizes: Float[Tensor, " d_model"], tau: float = TAU) -> list[int]:
    """The dimensions whose size is above tau, at most the eight largest."""
    found = sizes.topk(min(MOST_DIMENSIONS, len(sizes)))
    return sorted(int(d) for d, size in zip(found.indices, found.values, strict=True) if size > tau)
