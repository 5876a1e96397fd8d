"""Pattern atlas: all maps of all heads on all pictures, placed by a short code and sorted into kinds.

Li et al. 2023 (arXiv 2303.13731) summarise maps by the code of a convolutional autoencoder. The code here is linear:
the principal components of the maps, which no linear autoencoder of the same width beats in squared error, and which
need no training. head_clusters sorts the mean map of each head; here each map is sorted by itself, so that a head whose
pattern hangs on the picture is seen in several kinds.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import xarray as xr
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Seed
from headwater.analyses.heads.head_clusters import silhouette
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

MOST = 2**28  # numbers in all maps together: 1 GB in float32
SHOWN = 2000  # maps whose distances to each other are computed at once


@analysis
def pattern_atlas(
    record: Record,
    clusters: Annotated[int, "how many kinds", Bounds(2)] = 6,
    components: Annotated[int, "numbers in the code of a map", Bounds(1)] = 8,
    seed: Seed = 0,
) -> xr.Dataset:
    """The code and the kind of every map; kind 0 holds the most maps. Dataset:

    `code` [batch, layer, head, component], a map minus the mean map, on the principal components of all maps;
    `pattern` [component, query, key], these components, of length 1; `mean` [query, key]; `explained` [component], the
    share of the squared deviation from the mean that each holds; `kind` [batch, layer, head], from k-means on the codes
    (the best of ten starts); `share` [layer, head, cluster_number], how often a head's maps are of a kind; `steady`
    [layer, head], the share of its most frequent kind, 1 where the pattern does not hang on the picture; `prototype`
    [cluster_number, query, key], the map whose code lies nearest to the middle of a kind, from picture `of_picture` and
    head `of_head`; `size` [cluster_number], in maps. `silhouette` is the mean over (at most 2000) maps, and
    `silhouette_control` that of codes whose components were permuted over the maps, each by itself, and then sorted in
    the same way: these have no kinds but what each component's own distribution makes.

    Question: Which patterns are there among the maps, and which heads change theirs with the picture?
    Unit: code: weight; shares: 0 to 1; silhouette: -1 to 1.
    Source: after Li et al. 2023, arXiv:2303.13731 (pattern summary; a linear code in the place of its autoencoder).
    Cost: all maps in memory, batch × layers × heads × queries × keys numbers, at most 1 GB; one decomposition.
    Not for: how many kinds there are: compare `silhouette` with its control for several numbers; patterns that move
    with the object, which a linear code takes for different ones.

    >>> import headwater as hw, torch
    >>> record = hw.load("vit-digits").record(torch.rand(4, 1, 8, 8) * 2 - 1)
    >>> found = hw.analyses.pattern_atlas(record, clusters=3, components=2)
    >>> dict(found.code.sizes), int(found["size"].sum())
    ({'batch': 4, 'layer': 4, 'head': 6, 'component': 2}, 96)
    """
    if not bool(record.valid.all() and record.key_axis.valid.all()):
        raise AnalysisError(
            "maps of unequal length have no common code; record inputs of one length together"
        )
    batch, length = record.valid.shape
    heads, keys = (batch, len(record.layers), record.n_heads), record.key_axis.valid.shape[1]
    count = int(np.prod(heads))
    if count * length * keys > MOST:
        raise AnalysisError(
            f"{count} maps of {length} × {keys} weights take more than 1 GB; record fewer pictures or layers"
        )
    most = min(count - 1, length * keys)
    if max(clusters, components) > most:
        raise AnalysisError(
            f"clusters={clusters} and components={components} do not fit {count} maps of {length} × {keys} weights; "
            f"give at most {most}"
        )
    maps = np.stack([record.pattern(layer).cpu().numpy() for layer in record.layers], 1)
    table = maps.reshape(count, -1).astype(np.float64)
    mean = table.mean(0)
    left, sizes, patterns = np.linalg.svd(table - mean, full_matrices=False)
    code = (left * sizes)[:, :components]
    labels = _kinds(code, clusters, seed)
    middles = np.stack([code[labels == c].mean(0) for c in range(labels.max() + 1)])
    apart = cdist(middles, code)
    apart[labels[None] != np.arange(len(middles))[:, None]] = np.inf  # a prototype is of its own kind
    nearest = apart.argmin(1)
    pictures, layers, numbers = np.unravel_index(nearest, heads)
    kind = labels.reshape(heads)
    share = np.stack([(kind == c).mean(0) for c in range(len(middles))], -1)
    rng = np.random.default_rng(seed)
    control = np.stack([rng.permutation(each) for each in code.T], 1)
    by_map, square = ("batch", "layer", "head"), ("query", "key")
    return xr.Dataset(
        {
            "code": ((*by_map, "component"), code.reshape(*heads, -1)),
            "pattern": (("component", *square), patterns[:components].reshape(-1, length, keys)),
            "mean": (square, mean.reshape(length, keys)),
            "explained": ("component", (sizes**2 / max((sizes**2).sum(), 1e-30))[:components]),
            "kind": (by_map, kind),
            "share": (("layer", "head", "cluster_number"), share),
            "steady": (("layer", "head"), share.max(-1)),
            "prototype": (("cluster_number", *square), table[nearest].reshape(-1, length, keys)),
            "of_picture": ("cluster_number", pictures),
            "of_head": (
                "cluster_number",
                [f"{record.layers[a]}.{b}" for a, b in zip(layers, numbers, strict=True)],
            ),
            "size": ("cluster_number", np.bincount(labels)),
        },
        coords={
            "layer": record.layers, "head": np.arange(record.n_heads), "batch": np.arange(batch),
            "component": np.arange(components), "cluster_number": np.arange(len(middles)),
        },
        attrs={
            "silhouette": _sharp(code, labels, rng),
            "silhouette_control": _sharp(control, _kinds(control, clusters, seed), rng),
        },
    )  # fmt: skip


def _kinds(code: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The cluster of each code, the largest first, from the best of ten starts of k-means."""
    best, raw = np.inf, np.zeros(len(code), dtype=int)
    for start in range(10):
        middles, labels = kmeans2(code, clusters, minit="++", rng=np.random.default_rng([seed, start]))
        spread = ((code - middles[labels]) ** 2).sum()
        if spread < best:
            best, raw = spread, labels
    kinds, first, sizes = np.unique(raw, return_index=True, return_counts=True)
    return np.argsort(np.lexsort((first, -sizes)))[np.searchsorted(kinds, raw)]


def _sharp(code: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> float:
    """The mean silhouette of some codes."""
    some = rng.choice(len(code), min(len(code), SHOWN), replace=False)
    kept, numbered = np.unique(labels[some], return_inverse=True)
    if len(kept) < 2:
        return float("nan")
    return float(silhouette(cdist(code[some], code[some]), numbered).mean())
