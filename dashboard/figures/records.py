"""Figures of records and attention maps: one head exactly, all heads small, or a statistic.

A mosaic holds one pooled map for each head. The maps are pooled in blocks of rows, so memory follows the cells that
are drawn and not the tokens squared, and the cells of all heads together are bounded, so that the file is too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.names import check_tokens, with_tokens
from headwater.dashboard.figures.pattern import pattern_map
from headwater.dashboard.figures.pooling import MOST_CELLS, pool_blocks
from headwater.dashboard.figures.results import array_figure
from headwater.dashboard.figures.style import ATTENTION, finish, heat
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError, HeadError
from headwater.lens.records.record import Record

MOST_IN_A_MOSAIC, LARGEST_TILE, SMALLEST_TILE = 300_000, 48, 8  # cells in all, and on a side of a head
NO_MEAN = ("argmax", "visible", "received")  # their mean over tokens says nothing
ALL = slice(None)


def record_figure(
    record: Record, tokens: Sequence[str], title: str, layer: int | None = None, head: int | None = None,
    statistic: str | None = None, batch: int | None = None, image: Any = None,
) -> go.Figure:  # fmt: skip
    """The map of one head, the maps of all heads (of one layer), or a statistic of all heads or of one.

    Of one prompt in a batch its own tokens are drawn, without padding.
    """
    rows = len(record.valid)
    check_whole(layer=layer, head=head, batch=batch)
    check_tokens(tokens, {"query": record.valid.shape[1], "key": record.key_axis.valid.shape[1]})
    if batch is None and rows > 1 and statistic is None:
        batch = 0
    if batch is not None and not 0 <= batch < rows:
        raise AnalysisError(f"the record has no batch row {batch}; it has rows 0 to {rows - 1}")
    which = f"batch {batch} of {rows}" if rows > 1 and batch is not None else ""
    spans = _real(record.valid[batch or 0]), _real(record.key_axis.valid[batch or 0])
    if statistic is not None:
        return _statistic(record, statistic, layer, head, batch, spans, tokens, title, image)
    if image is not None:
        raise AnalysisError(
            "over a picture goes one number per patch: give statistic='received', or a result"
        )
    if head is not None:
        if layer is None:
            raise HeadError(f"head={head} needs its layer: layer=3, head={head}")
        named = [
            tokens if len(tokens) == len(words) else words
            for words in (record.strings[batch or 0], record.key_axis.strings[batch or 0])
        ]
        return map_figure(record.map(layer), head, batch or 0, named[0], named[1],
                          title or f"Which tokens does head {layer}.{head} attend to?", which, spans)  # fmt: skip
    layers = record.layers if layer is None else [layer]
    maps = {number: record.map(number) for number in layers}
    return mosaic(maps, batch or 0, title or "Which tokens does each head attend to?", which, spans)


def check_whole(**asked: object) -> None:
    """AnalysisError where one of these is neither None nor a whole number."""
    for name, value in asked.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise AnalysisError(f"{name}= takes one whole number, counted from 0; got {value!r}")


def _real(valid: Tensor) -> slice:
    """From the first to the last real token of a prompt."""
    places = valid.nonzero().flatten().tolist()
    return slice(places[0], places[-1] + 1) if places else slice(0, len(valid))


def map_figure(
    map: AttentionMap, head: int, batch: int, query_tokens: Sequence[str], key_tokens: Sequence[str], title: str,
    told: str = "", spans: tuple[slice, slice] = (ALL, ALL),
) -> go.Figure:  # fmt: skip
    """The exact map of a head with what each key receives and how spread each query is; pooled above 512 tokens.

    `spans` are the queries and the keys that are drawn.
    """
    _, heads, queries, keys = map.shape
    if not 0 <= head < heads:
        raise HeadError(f"there is no head {head}; the map has heads 0 to {heads - 1}")
    of_queries = query_tokens if len(query_tokens) == queries else [""] * queries
    of_keys = key_tokens if len(key_tokens) == keys else [""] * keys
    rows, columns = (range(n)[span] for n, span in zip((queries, keys), spans, strict=True))
    shape = len(rows), len(columns)
    # over the queries that see a key: padding sees none, and a window hides far keys
    visible = map.visible()[batch, head].clamp(min=1)
    received = (map.received(heads=[head])[batch, 0].cpu() / visible.cpu()).numpy()[spans[1]]
    entropy = None
    if max(shape) <= MOST_CELLS:
        weights = map.tile(slice(rows.start, rows.stop), slice(columns.start, columns.stop), [head])
        shown = weights[batch, 0].cpu().numpy()
    else:
        every = ((place, block[batch, 0, :, spans[1]]) for place, block in map.row_blocks([head]))
        kept = (_within(place, block.cpu().numpy(), rows) for place, block in every)
        shown = pool_blocks(kept, shape)
        entropy = map.statistic("entropy")[batch, head].cpu().numpy()[spans[0]]
    return pattern_map(
        shown, of_queries[spans[0]], of_keys[spans[1]], escaped(title), received=received, entropy=entropy,
        told=told, first_query=rows.start, first_key=columns.start,
    )  # fmt: skip


def _within(place: slice, block: np.ndarray, rows: range) -> tuple[slice, np.ndarray]:
    """The rows of a block that are drawn, at their places among these."""
    first, last = max(place.start, rows.start), max(min(place.stop, rows.stop), rows.start)
    return slice(first - rows.start, last - rows.start), block[first - place.start : last - place.start]


def mosaic(
    maps: Mapping[int, AttentionMap], batch: int, title: str, told: str = "",
    spans: tuple[slice, slice] = (ALL, ALL),
) -> go.Figure:  # fmt: skip
    """Layers down, heads across, a small map in each place, all on one colour scale."""
    heads = max(map.shape[1] for map in maps.values())
    drawn = {
        layer: [range(n)[span] for n, span in zip(map.shape[2:], spans, strict=True)]
        for layer, map in maps.items()
    }
    length = max(len(places) for axes in drawn.values() for places in axes)
    side = int(np.clip((MOST_IN_A_MOSAIC / (len(maps) * heads)) ** 0.5, SMALLEST_TILE, LARGEST_TILE))
    block = -(-length // side)
    figure = go.Figure()
    for row, (layer, map) in enumerate(maps.items()):
        down, across = (slice(axis.start // block, -(-axis.stop // block)) for axis in drawn[layer])
        tiles = map.pooled(block)[batch, :, down, across].numpy()
        for head in range(map.shape[1]):
            down, across = tiles[head].shape
            word = "weight" if block == 1 else "largest weight of the block"
            trace = heat(
                tiles[head], (0.0, 1.0), ATTENTION, "attention weight", showscale=row == head == 0,
                x0=head - 0.46 + 0.46 / across, dx=0.92 / across, y0=row - 0.46 + 0.46 / down, dy=0.92 / down,
                hovertemplate=f"head {layer}.{head}<br>{word} %{{z:.3f}}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(trace)
    plain: dict[str, Any] = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(
        title="head", range=[-0.5, heads - 0.5], dtick=1 if heads < 25 else 4, tick0=0, **plain
    )
    numbers = [str(layer) for layer in maps]
    figure.update_yaxes(
        title="layer",
        range=[len(maps) - 0.5, -0.5],
        tickvals=list(range(len(maps))),
        ticktext=numbers,
        **plain,
    )
    each = f"each cell is the largest weight of {block} × {block}" if block > 1 else "each cell is one weight"
    parts = [told, f"{length} tokens; queries down, keys across in each head", each, "colour scale 0 to 1"]
    tall = int(np.clip(min(1000 / heads, 1300 / len(maps)), 24, 150))
    figure = finish(figure, escaped(title), " · ".join(filter(None, parts)), height=150 + tall * len(maps))
    return figure.update_layout(plot_bgcolor="#d7dde3", hoverdistance=-1)


def _statistic(
    record: Record, name: str, layer: int | None, head: int | None, batch: int | None,
    spans: tuple[slice, slice], tokens: Sequence[str], title: str, image: Any,
) -> go.Figure:  # fmt: skip
    """A statistic per token of one head, or its mean over the tokens for every head, where a mean says something."""
    found = record.statistic(name)
    picked = {axis: value for axis, value in (("layer", layer), ("head", head)) if value is not None}
    for axis, value in picked.items():
        if value not in found[axis].values:
            raise HeadError(
                f"there is no {axis} {value}; the record has {', '.join(map(str, found[axis].values))}"
            )
    found = with_tokens(found.sel(picked), tokens)
    meaning = str(found.attrs.get("long_name", name))
    along = next((dim for dim in ("query", "key") if dim in found.dims), None)
    if batch is not None:
        found = found.isel(batch=batch)
        found = found.assign_coords(batch=batch) if len(record.valid) > 1 else found  # so that it is told
        if along is not None:
            span = spans[along == "key"]
            places = np.arange(found.sizes[along])[span]
            found = found.isel({along: span}).assign_coords({along: places})
    if along is not None and name not in NO_MEAN and not picked and image is None:
        dims = [along, *(["batch"] if "batch" in found.dims else [])]
        mean = found.astype(float).mean(dims, skipna=True).assign_attrs(found.attrs)
        prompts = f" and {found.sizes['batch']} prompts" if found.sizes.get("batch", 1) > 1 else ""
        told = title or f"{name}: {meaning}; mean over tokens{prompts}"
        return array_figure(mean, (), told, name=name)
    return array_figure(found, (), title or f"{name}: {meaning}", image, name=name)
