"""All heads' attention maps as one picture of layers × heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import pandas as pd

from headwater.dashboard.canvas.head_tiles import Head, Look, draw
from headwater.dashboard.canvas.packing import unseen
from headwater.dashboard.figures.pooling import Pooled, pool

MASKED = 255  # in place of a weight
# cells a side of a small map, and the number of heads above which the maps are coarse
FINE, COARSE, MANY = 32, 16, 256


def side_for(heads: int) -> int:
    """Cells a side of each small map, so that the picture of ``heads`` heads stays at 0.26 MB."""
    return FINE if heads <= MANY else COARSE


def small(
    weights: np.ndarray | Pooled, most: int = FINE, *, causal: bool = False, first: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """A map [query, key] as at most ``most`` × ``most`` bytes: 254 times the root of the largest weight of each block.

    The root keeps small weights apart that a byte would round to nothing; 255 stands for masked pairs.
    """
    pooled = weights if isinstance(weights, Pooled) else pool(np.asarray(weights, dtype=np.float32), most)
    cells = np.array(pooled.cells, dtype=np.float32)
    if causal:
        cells[unseen(pooled, first)] = np.nan
    masked = ~np.isfinite(cells)
    drawn = np.round(254 * np.sqrt(np.clip(np.where(masked, 0, cells), 0, 1))).astype(np.uint8)
    drawn[masked] = MASKED
    return drawn


def weights_in(maps: Mapping[Head, np.ndarray]) -> pd.DataFrame:
    """The weights behind the bytes of small maps, one line per head and block; masked blocks are left out.

    A byte keeps the root of a weight to 0.002.
    """
    heads, cells = np.array(list(maps)), np.stack(list(maps.values()))
    at, query, key = np.nonzero(cells != MASKED)
    weights = (cells[at, query, key] / 254.0) ** 2
    columns = {"layer": heads[at, 0], "head": heads[at, 1], "query block": query, "key block": key}
    return pd.DataFrame({**columns, "weight": weights})


def mosaic(
    maps: Mapping[Head, np.ndarray],
    layers: Sequence[int],
    heads: Sequence[int],
    **look: Unpack[Look],
) -> dict[str, Any] | None:
    """Draw ``maps[layer, head]``, each made by `small`; events are those of `head_tiles.draw`.

    Heads without a map stay empty. Raises ValueError where the maps are no bytes or of different sizes.
    """
    sizes = {np.shape(drawn) for drawn in maps.values()}
    kinds = {np.asarray(drawn).dtype for drawn in maps.values()}
    if (
        len(sizes) > 1
        or kinds - {np.dtype(np.uint8)}
        or any(len(size) != 2 or max(size) > FINE for size in sizes)
    ):
        raise ValueError(
            f"maps must be bytes [query, key] of one size, at most {FINE} a side, as small() makes them; "
            f"got {sorted(map(str, sizes))} of {sorted(map(str, kinds))}"
        )
    order = [(layer, head) for layer in layers for head in heads]
    present = [place for place, head in enumerate(order) if head in maps]
    rows, columns = sizes.pop() if sizes else (0, 0)
    values = np.stack([maps[order[place]] for place in present]) if present else np.zeros(0, dtype=np.uint8)
    header: dict[str, object] = {
        "kind": "map",
        "unit": "weight, square root",
        "low": 0.0,
        "high": 1.0,
        "signed": False,
        "rows": rows,
        "columns": columns,
        "present": present,
    }
    return draw(header, values, layers, heads, described(maps, len(layers), len(heads), look), **look)


def described(maps: Mapping[Head, np.ndarray], layers: int, heads: int, look: Look, most: int = 5) -> str:
    """A sentence of what is seen: the heads of the largest weights, leaving out the first keys, where sinks are."""
    largest = {
        head: int(np.where(drawn == MASKED, 0, drawn)[:, 1:].max(initial=0)) for head, drawn in maps.items()
    }
    best = sorted(largest, key=lambda head: -largest[head])[:most]
    found = [f"{layer}.{head} {(largest[layer, head] / 254) ** 2:.2f}" for layer, head in best]
    chosen, pins = look.get("chosen"), look.get("pins", ())
    said = [f"{layers} layers of {heads} heads"]
    said += [f"Largest weights beyond the first keys: {', '.join(found)}"] if found else []
    said += [f"Head {chosen[0]}.{chosen[1]} is chosen"] if chosen else []
    said += [f"Pinned: {', '.join(f'{layer}.{head}' for layer, head in pins)}"] if pins else []
    return ". ".join(said) + "."
