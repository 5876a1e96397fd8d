"""Reference frames: whether the attention of a layer refers to one token, to several, to both ends, or to none.

Ruscio, Nanni & Silvestri 2025 (arXiv 2508.02546) name centralised, distributed and bidirectional frames. Only their
abstract and set-up were read: every formula here is ours, from memory of the standard definitions, and not checked
against the paper. Sinks and concentration take linear memory; spectrum and topology need the dense map of a layer and
are limited to short texts.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.sinks import _graph_measures as graphs
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

LONGEST_SPECTRUM, LONGEST_TOPOLOGY = 512, 128
SINGLE = 0.5  # share of the sink mass with which the largest sink makes a frame centralised
END = 0.25  # share that each end has in a bidirectional frame
FRAMES = ("none", "centralised", "distributed", "bidirectional")


@analysis
def reference_frames(
    record: Record,
    tau: Annotated[float, "weight from which a query attends to a token", Bounds(0.0, 1.0)] = 0.3,
    gamma: Annotated[float, "share of queries that must attend to a sink", Bounds(0.0, 1.0)] = 0.5,
    spectrum: Annotated[bool, "eigenvalues of the graph; texts up to 512 tokens"] = True,
    topology: Annotated[bool, "Betti numbers of the graph; texts up to 128 tokens"] = False,
    quantile: Annotated[float, "edges above this quantile make the topology", Bounds(0.0, 1.0)] = 0.9,
    normalised: Annotated[bool, "normalised Laplacian in place of D - W"] = False,
    min_queries: Annotated[int, "tokens that fewer queries see do not count", Bounds(1)] = 3,
) -> xr.Dataset:
    """Measures [batch, layer] of `A`, the mean over a layer's heads, and the frame that follows from them.

    Token j is a sink if `#{i : A_ij ≥ tau} / #{i that see j} ≥ gamma`; its share is `c_j = Σ_i A_ij / #{i that see j}`.
    `sinks` is their number, `concentration` the largest c, `top` the column of its token; `gini` and `received_entropy`
    are of c; `centralisation = Σ_j (c_max - c_j)/(n - 1)` after Freeman, 1 for a pure sink. Means over rows:
    `kl_uniform` of KL(A_i ‖ uniform on the visible keys), `kl_without_sink` of KL(A_i without the top token,
    renormalised ‖ A_i) = -ln(1 - A_i,top); the other direction would be infinite.
    `spectrum`, of `W = (A + Aᵀ)/2` without its diagonal: `fiedler`, the second eigenvalue of the Laplacian; `gap`, the
    difference of its two largest; `spectral_entropy`, over all eigenvalues; `alignment`, |v_1[top]| of W's leading
    eigenvector. `topology`, of the edges at or above `quantile` of W's positive entries: `components`, `cycles` (of the
    graph), `holes` (of its clique complex, over GF(2)).
    `frame` is "none" without a sink; "bidirectional" if the two largest sinks are the first and the last token, each
    with 0.25 of the sinks' c or more; "centralised" if the largest has 0.5 or more; else "distributed".

    The patches of a picture have no first and last token, so its frames are never bidirectional. In cross-attention the
    tokens are those that are looked at; it is no graph of one set of tokens, so it takes spectrum=False and
    topology=False. Rows are not renormalised. A text of fewer than 3 tokens has NaN. AnalysisError for texts above the
    limits. The defaults of tau and gamma are ours: try how the frame depends on them.

    Question: On which reference tokens does each layer's attention hang: one, several, both ends, or none?
    Unit: sinks: tokens; concentration, centralisation, gini: 0 to 1; entropies and KL: nats; Betti numbers: counts.
    Source: Ruscio, Nanni & Silvestri 2025, arXiv:2508.02546 (frames, by the abstract); measures are ours, from memory.
    Cost: one walk over the rows of each layer; spectrum n³ and topology per layer, up to 512 and 128 tokens.
    Not for: naming the position encoding of a model; texts of a few tokens; more than a description of these texts.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.reference_frames(record)
    >>> found.frame.shape, found.frame.values[0].tolist()
    ((1, 4), ['centralised', 'none', 'centralised', 'centralised'])
    """
    _check(record, spectrum, topology)
    rows = []
    for layer in record.layers:
        walks = _walk(record, layer, tau)
        per_text = []
        for b, real in enumerate(record.valid):
            found = _measures(record, layer, walks, b, gamma, min_queries)
            if (spectrum or topology) and int(real.sum()) > 2:
                graph = graphs.symmetric(_mean_map(record, layer, b))
                top = int(real[: found["top"]].sum())  # among the real tokens
                found |= _spectrum(graph, top, normalised) if spectrum else {}
                found |= _topology(graph, quantile) if topology else {}
            per_text.append(found)
        rows.append(per_text)
    names = list(dict.fromkeys(name for layer in rows for text in layer for name in text))
    data = {
        name: (("batch", "layer"), np.array([[text.get(name, np.nan) for text in layer] for layer in rows]).T)
        for name in names
    }
    return xr.Dataset(data, coords={"layer": record.layers})


def _check(record: Record, spectrum: bool, topology: bool) -> None:
    if record.keys is not None and (spectrum or topology):
        name = "spectrum" if spectrum else "topology"
        raise AnalysisError(
            f"the {name} is of a graph whose tokens look at each other, and cross-attention looks at other tokens; "
            f"give {name}=False"
        )
    longest = int(record.valid.sum(1).max())
    for name, limit in (("topology", LONGEST_TOPOLOGY * topology), ("spectrum", LONGEST_SPECTRUM * spectrum)):
        if limit and longest > limit:
            raise AnalysisError(
                f"a text has {longest} tokens and the {name} is for up to {limit}; record less or give {name}=False"
            )


class _Walk(NamedTuple):
    """Sums over the rows of a layer's mean map, [batch, key], and numbers of each row, [batch, query]."""

    received: Tensor
    looking: Tensor
    entropy: Tensor
    mass: Tensor


def _walk(record: Record, layer: int, tau: float) -> _Walk:
    """One walk over blocks of rows, averaged over heads in float64; linear memory."""
    map = record.map(layer)
    batch, _, queries, keys = map.shape
    received, looking = (torch.zeros(batch, keys, dtype=torch.float64) for _ in range(2))
    entropy, mass = (torch.zeros(batch, queries, dtype=torch.float64) for _ in range(2))
    for span, weights in map.row_blocks():
        mean = weights.double().mean(1).cpu()
        received += mean.sum(1)
        looking += (mean >= tau).sum(1)
        mass[:, span] = mean.sum(-1)
        unit = mean / torch.where(mass[:, span] > 0, mass[:, span], 1.0)[..., None]
        entropy[:, span] = torch.special.entr(unit).sum(-1)
    return _Walk(received, looking, entropy, mass)


def _mean_map(record: Record, layer: int, b: int) -> np.ndarray:
    """The mean map over heads of one text, dense [query, key], without padding."""
    place = record.valid[b].nonzero()[:, 0]
    rows = [weights[b].double().mean(0).cpu() for _, weights in record.map(layer).row_blocks()]
    return torch.cat(rows)[place][:, place].numpy()


def _measures(
    record: Record, layer: int, walk: _Walk, b: int, gamma: float, min_queries: int
) -> dict[str, Any]:
    """The measures of one text that need only its columns and rows."""
    looks = record.valid[b].nonzero()[:, 0].numpy()
    place = record.key_axis.valid[b].nonzero()[:, 0].numpy()
    if len(place) < 3:
        return {"frame": "", "sinks": np.nan, "top": -1}
    map = record.map(layer)
    counts = (count(len(record.valid), 1) for count in (map.rule.mask.seen_by, map.rule.mask.visible_keys))
    seen, ahead = (
        found[b % len(found), 0].numpy()[axis] for found, axis in zip(counts, (place, looks), strict=True)
    )
    received, looking, spread, mass = (
        x[b].numpy()[axis] for x, axis in zip(walk, (place, place, looks, looks), strict=True)
    )
    judged = seen >= min(min_queries, seen.max())
    share = np.where(judged, received / np.maximum(seen, 1), 0.0)
    sinks = np.flatnonzero(judged & (looking / np.maximum(seen, 1) >= gamma) & (share > 0))
    top = int(share.argmax())
    column = int(place[top])
    tile = map.tile(slice(0, map.shape[2]), slice(column, column + 1))[b, :, :, 0]
    beside = tile.double().mean(0).cpu().numpy()[looks]
    rows = mass > 0
    removed = np.clip(beside[rows] / mass[rows], 0, 1)
    left = removed < 1 - 1e-6  # a row that sees only the top token is undefined
    return {
        "frame": _frame(sinks, share, {0, len(place) - 1} if record.ordered_keys else set()),
        "sinks": len(sinks),
        "top": column,
        "concentration": float(share.max()),
        "gini": graphs.gini(share[judged]),
        "received_entropy": graphs.entropy(share[judged]),
        "centralisation": float((share.max() - share[judged]).sum() / max(judged.sum() - 1, 1)),
        "kl_uniform": float((np.log(np.maximum(ahead[rows], 1)) - spread[rows]).mean()),
        "kl_without_sink": float(-np.log1p(-removed[left]).mean()) if left.any() else np.nan,
    }


def _frame(sinks: np.ndarray, share: np.ndarray, ends: set[int]) -> str:
    """The type of frame of a text with these sinks and shares c; `ends` are its first and its last token."""
    if not len(sinks):
        return "none"
    order = sinks[np.argsort(-share[sinks], kind="stable")]
    parts = share[order] / share[sinks].sum()
    if len(order) > 1 and {int(order[0]), int(order[1])} == ends and parts[1] >= END:
        return "bidirectional"
    return "centralised" if parts[0] >= SINGLE else "distributed"


def _spectrum(graph: np.ndarray, top: int, normalised: bool) -> dict[str, float]:
    values = graphs.laplacian_spectrum(graph, normalised)
    return {
        "fiedler": float(values[1]),
        "gap": float(values[-1] - values[-2]),
        "alignment": float(graphs.top_direction(graph)[top]),
        "spectral_entropy": graphs.entropy(np.clip(values, 0, None)),
    }


def _topology(graph: np.ndarray, quantile: float) -> dict[str, int]:
    edges = graph[np.triu_indices(len(graph), 1)]
    positive = edges[edges > 0]
    threshold = np.quantile(positive, quantile) if len(positive) else np.inf
    components, cycles, holes = graphs.betti(graph, float(threshold))
    return {"components": components, "cycles": cycles, "holes": holes}
