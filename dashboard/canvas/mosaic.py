"""All heads' attention maps as one picture of layers × heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from headwater.dashboard.canvas.head_tiles import Head, draw
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


def mosaic(
    maps: Mapping[Head, np.ndarray],
    layers: Sequence[int],
    heads: Sequence[int],
    *,
    key: str,
    title: str = "",
    chosen: Head | None = None,
    pins: Sequence[Head] = (),
    note: str = "",
    alt: str | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Draw ``maps[layer, head]``, each made by `small`, and give what was clicked, once, or None.

    ``{"head": (layer, head)}`` is a click or Enter, ``{"pin": (layer, head)}`` the same with Shift or Ctrl.
    Heads without a map stay empty. With ``on_event`` the event goes to it before the script runs.
    Raises ValueError where the maps are no bytes or of different sizes.
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
        "title": title,
        "alt": described(title, len(layers), len(heads), chosen, pins) if alt is None else alt,
        "note": note,
        "unit": "weight, square root",
        "low": 0.0,
        "high": 1.0,
        "signed": False,
        "rows": rows,
        "columns": columns,
        "present": present,
    }
    return draw(header, values, layers, heads, key=key, chosen=chosen, pins=pins, on_event=on_event)


def described(title: str, layers: int, heads: int, chosen: Head | None, pins: Sequence[Head]) -> str:
    said = [title or "Attention maps", f"{layers} layers of {heads} heads"]
    said += [f"head {chosen[0]}.{chosen[1]} is chosen"] if chosen else []
    said += [f"pinned: {', '.join(f'{layer}.{head}' for layer, head in pins)}"] if pins else []
    return ". ".join(said) + "."
