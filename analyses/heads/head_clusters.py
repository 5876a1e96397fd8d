"""Head clusters: groups of heads with similar attention patterns.

A feature vector summarises each head: its map pooled into coarse cells, or statistics of its rows. scipy clusters the
distances between the vectors, and the medoid of each cluster is its prototype. Li et al. 2023 (arXiv 2303.13731) use
an autoencoder for the summary; cells and statistics need no training.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.tokens.patch_distance import patch_distance
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.heads import every_head
from headwater.lens.records.record import Record

STATISTICS = ("self", "previous", "first", "max", "entropy", "distance")
ACROSS = ("first", "max", "entropy")  # those of cross-attention, where no key is the query's own position
UNORDERED = (
    "self",
    "max",
    "entropy",
)  # those of the patches of a picture, besides their distance on its grid


@analysis
def head_clusters(
    record: Record,
    clusters: Annotated[int, "how many kinds", Bounds(1)] = 4,
    features: Annotated[Literal["cells", "statistics"], "pooled map, or row statistics"] = "cells",
    method: Annotated[Literal["ward", "average", "complete", "kmeans"], "linkage, or k-means"] = "ward",
    cells: Annotated[int, "cells per side of the coarse map", Bounds(1)] = 8,
    seed: Annotated[int, "seed of the start of k-means", Bounds(0)] = 0,
) -> xr.Dataset:
    """Cluster of every head, 0 being the largest. `member` and `other` name the heads "layer.head". Dataset:

    `cluster` [layer, head]; `feature` [member, summary], the cells row by row, or the statistics, each divided by its
    standard deviation over heads; `distance` [member, other], Euclidean between features; `prototype` [cluster_number],
    the member with the smallest sum of distances to its cluster; `size` [cluster_number]; `silhouette` [layer, head],
    `(b - a) / max(a, b)` with a the mean distance to its own cluster and b to the nearest other one (0 in a cluster of
    one). Cells also give `pooled` [cluster_number, query_cell, key_cell], the mean map of each cluster.

    Cells: token i of n falls into cell ⌊i·cells/n⌋. A cell is the mean over its queries of the weight on its keys,
    first within a text, then over texts; a text with fewer tokens than cells leaves the missing query cells out.
    Statistics: the mean weight on the query's own, the previous and the first token; the mean largest weight; the
    entropy divided by the log of the number of visible tokens; the distance divided by that number. On the patches of
    a picture, which have no order: own, largest, entropy, and of `patch_distance` `hops` (`mean_hops` divided by the
    farthest hop) and `others` (`to_prefix`). In cross-attention: first, largest, entropy.

    Question: Which kinds of patterns do the heads fall into?
    Unit: cluster numbers; cells: weight; statistics: shares, 0 to 1.
    Source: after Li et al. 2023, arXiv:2303.13731 (pattern summary; the summaries here are ours).
    Cost: cells: one attention pass per layer; statistics: those of the recording pass; memory O(S + heads²).
    Not for: how many kinds there are: the number is given (compare `silhouette`); what the heads are for.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.head_clusters(record, clusters=3)
    >>> dict(found.pooled.sizes), int(found.size.sum())
    ({'cluster_number': 3, 'query_cell': 8, 'key_cell': 8}, 32)
    """
    count = len(record.layers) * record.n_heads
    if clusters > count:
        raise AnalysisError(
            f"clusters={clusters} does not fit {count} heads; give a number from 1 to {count}"
        )
    pooled = pooled_maps(record, cells) if features == "cells" else None
    names, table = statistics_of(record) if pooled is None else ((), pooled.reshape(count, -1))
    apart = pdist(table)
    labels = _labels(table, apart, clusters, method, seed)
    distance = squareform(apart)
    middle = [_middle(distance, labels == c) for c in range(labels.max() + 1)]
    by_head = (len(record.layers), record.n_heads)
    heads = [str(head) for head in every_head(record.layers, record.n_heads)]
    result = xr.Dataset(
        {
            "cluster": (("layer", "head"), labels.reshape(by_head)),
            "feature": (("member", "summary"), table),
            "distance": (("member", "other"), distance),
            "prototype": ("cluster_number", np.array(heads)[middle]),
            "size": ("cluster_number", np.bincount(labels)),
            "silhouette": (("layer", "head"), silhouette(distance, labels).reshape(by_head)),
        },
        coords={
            "layer": record.layers, "head": np.arange(record.n_heads), "member": heads, "other": heads,
            "cluster_number": np.arange(labels.max() + 1),
        },
    )  # fmt: skip
    if pooled is None:
        return result.assign_coords(summary=list(names))
    means = np.stack([pooled[labels == c].mean(0) for c in range(labels.max() + 1)])
    return result.assign(pooled=(("cluster_number", "query_cell", "key_cell"), means))


def pooled_maps(record: Record, cells: int) -> np.ndarray:
    """Maps pooled to cells × cells, [layer · head, query cell, key cell]: a sum over keys, a mean over queries."""
    looking, seen = _in_cells(record.valid, cells), _in_cells(record.key_axis.valid, cells)
    rows = looking / looking.sum(1, keepdim=True)  # NaN where a short text leaves a cell empty
    found = []
    for layer in record.layers:
        on_cells = (record.map(layer) @ seen.float()).double().cpu()  # [batch, head, query, key cell]
        per_text = torch.einsum("bqr,bhqc->bhrc", rows, on_cells)
        found.append(per_text.nanmean(0).nan_to_num())
    return torch.cat(found).numpy()


def _in_cells(valid: Tensor, cells: int) -> Tensor:
    """Which cell each real token falls into, 0 or 1, [batch, position, cell] in float64."""
    own = (valid.cumsum(1) - 1) * cells // valid.sum(1, keepdim=True)
    return (torch.nn.functional.one_hot(own.clamp_min(0), cells) * valid[..., None]).double()


def statistics_of(record: Record) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the row statistics, and their means over texts, divided by their standard deviation over heads,
    [layer · head, statistic]."""
    names = STATISTICS if record.ordered else UNORDERED if record.keys is None else ACROSS
    maps = [record.map(layer) for layer in record.layers]
    seen = torch.stack([map.rule.mask.visible_keys(*map.shape[:2]).expand(map.shape[:3]) for map in maps], 1)
    count = xr.DataArray(seen.numpy(), dims=("batch", "layer", "head", "query"))
    values = {name: record.statistic(name).drop_attrs() for name in names}
    values["entropy"] = values["entropy"] / np.log(count.where(count > 1))
    if "distance" in names:
        values["distance"] = values["distance"] / count.where(count > 0)
    real = xr.DataArray(record.valid.numpy(), dims=("batch", "query"))
    means = {
        name: values[name].where(real).astype(float).mean("query").mean("batch").fillna(0.0) for name in names
    }
    if not record.ordered and record.keys is None and any(record.grids):
        on_grid = patch_distance(record)
        means["hops"] = on_grid.mean_hops / max(on_grid.sizes["hop"] - 1, 1)
        means["others"] = on_grid.to_prefix
    table = np.stack([mean.values.ravel() for mean in means.values()], 1)
    deviation = table.std(0)
    return tuple(means), table / np.where(deviation > 1e-9, deviation, 1.0)


def _labels(table: np.ndarray, apart: np.ndarray, clusters: int, method: str, seed: int) -> np.ndarray:
    """Cluster of each head, sorted by size; clusters of equal size by their first head."""
    if len(table) == 1:
        return np.zeros(1, dtype=int)
    if method == "kmeans":
        _, raw = kmeans2(table, clusters, minit="++", rng=np.random.default_rng(seed))
    else:
        raw = fcluster(linkage(apart, method), clusters, criterion="maxclust")
    kinds, first, sizes = np.unique(raw, return_index=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    return np.argsort(order)[np.searchsorted(kinds, raw)]


def _middle(distance: np.ndarray, members: np.ndarray) -> int:
    """The medoid: the member with the smallest sum of distances to the others."""
    places = np.flatnonzero(members)
    return int(places[distance[np.ix_(places, places)].sum(1).argmin()])


def silhouette(distance: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How much nearer each head is to its own cluster than to the nearest other, -1 to 1; NaN with one cluster."""
    sizes = np.bincount(labels)
    if len(sizes) == 1:
        return np.full(len(labels), np.nan)
    sums = np.stack([distance[:, labels == c].sum(1) for c in range(len(sizes))], 1)
    own = np.take_along_axis(sums, labels[:, None], 1)[:, 0] / np.maximum(sizes[labels] - 1, 1)
    means = sums / sizes
    means[np.arange(len(labels)), labels] = np.inf
    next_one = means.min(1)
    scale = np.maximum(own, next_one)
    return np.where((sizes[labels] > 1) & (scale > 0), (next_one - own) / np.where(scale > 0, scale, 1), 0.0)
