"""`figure`: the figure of any result, as a plotly figure that a notebook shows and a paper takes.

plotly is an extra. It is imported when a figure is asked for, so that `import headwater` works without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
import xarray as xr

from headwater.analyses._corpora.result import Corpus
from headwater.dashboard.figures.names import check_tokens
from headwater.dashboard.figures.select import VARIABLE, choose
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.records.graph import without_graph
from headwater.lens.records.record import Record

if TYPE_CHECKING:
    import plotly.graph_objects as go

OF_A_RECORD = ("layer", "head", "statistic", "batch")
OF_A_CORPUS = ("layer", "head", "statistic")
OF_A_MAP = ("head", "batch")


def figure(
    result: Any, tokens: Sequence[str] = (), title: str | None = None, *, image: Any = None, **chosen: Any
) -> go.Figure:
    """Draw a result: an array, a Dataset, a graph, a record, a corpus or an attention map.

    `chosen` takes one value of an axis, `role="induction"` or `layer=3`: a label, else a position; a list keeps
    several. `variable="rate"` takes one array of a Dataset. A record takes `layer=`, `head=`, `statistic=` and
    `batch=`: the map of a head, the maps of all heads, or a statistic. A corpus takes `statistic=`, and for one
    head's distribution `layer=` and `head=`. What has more axes than a panel gets panels
    side by side, or a menu that a written page keeps; the subtitle says which slice is shown.

    `tokens` name queries and keys in place of the result's own, one text for each. `title` stands in for the result's
    question. With `image`, the picture as the model saw it, numbers per patch lie over it; of a result of several
    examples choose one, as in `batch=0`. Of a record of several
    prompts `batch` says which one is drawn, without its padding.

    The figure is plotly's and holds every number as it came: `.show()`, `.write_html("a.html")`, and
    `.write_image("a.svg")`, also .pdf and .png, through kaleido and a Chromium. HeadwaterError, one line, for an axis,
    a label or a type that can not be drawn, and where plotly is missing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> roles = hw.analyses.head_roles(model, sequences=2, length=10)
    >>> drawn = hw.figure(roles, role="induction")
    >>> drawn.layout.xaxis.title.text, drawn.layout.yaxis.title.text
    ('head', 'layer')
    """
    try:
        import plotly  # noqa: F401 - asked for first, so that an error inside of a figure is not taken for it
    except ModuleNotFoundError:
        raise HeadwaterError("figures need plotly; pip install 'headwater[figures]'") from None
    from headwater.dashboard.figures import corpora, graph, records, results

    tokens = _words(tokens)
    result = without_graph(result)
    if isinstance(result, Record):
        return records.record_figure(result, tokens, title or "", image=image, **_known(chosen, OF_A_RECORD))
    if isinstance(result, Corpus):
        of = _known(chosen, OF_A_CORPUS)
        statistic = of.get("statistic") or "weight"
        if {"layer", "head"} & of.keys():
            return corpora.head_of_corpus(
                result, of.get("layer", 0), of.get("head", 0), statistic, title or ""
            )
        return figure(result.mean(statistic), title=title or f"Mean of {statistic}")
    if isinstance(result, AttentionMap):
        if image is not None:
            raise AnalysisError("over a picture goes one number per patch; an attention map has many")
        return _of_map(result, tokens, title, **_known(chosen, OF_A_MAP))
    result = _labelled(result)
    name = chosen.get(VARIABLE)
    if isinstance(result, xr.Dataset) and isinstance(name, str) and name in result.data_vars:
        ends = results.interval(result, name)  # an estimate keeps its bounds
        chosen = {**chosen, VARIABLE: [name, *ends]} if ends else chosen
    result = choose(result, chosen)
    told = result.graph if isinstance(result, nx.Graph) else result.attrs
    title = str(title or told.get("question") or getattr(result, "name", None) or "Result")
    if isinstance(result, nx.Graph):
        if image is not None or len(tokens):
            raise AnalysisError(
                "a graph is drawn by the names of its nodes; it takes neither tokens= nor image="
            )
        return graph.circuit_graph(result, title)
    several = result.sizes.get("batch", 1)
    if image is not None and several > 1:
        raise AnalysisError(
            f"the result is of {several} examples and image is one picture; choose whose it is: hw.figure(…, batch=0)"
        )
    check_tokens(tokens, {str(dim): size for dim, size in result.sizes.items()})
    if isinstance(result, xr.Dataset):
        return results.dataset_figure(result, tokens, title, image)
    return results.array_figure(result, tokens, title, image)


def _of_map(
    map: AttentionMap, tokens: Sequence[str], title: str | None, head: int | None = None, batch: int = 0
) -> Any:
    from headwater.dashboard.figures import records

    records.check_whole(head=head, batch=batch)
    check_tokens(tokens, {"query": map.shape[2], "key": map.shape[3]})
    if not 0 <= batch < map.shape[0]:
        raise AnalysisError(f"the map has no batch row {batch}; it has rows 0 to {map.shape[0] - 1}")
    if head is not None:
        return records.map_figure(
            map, head, batch, tokens, tokens, title or f"Which tokens does head {head} attend to?"
        )
    return records.mosaic({0: map}, batch, title or "Which tokens does each head attend to?")


def _labelled(result: Any) -> xr.DataArray | xr.Dataset | nx.Graph:
    """A result with named axes; several arrays by name become one Dataset."""
    if isinstance(result, xr.DataArray | xr.Dataset | nx.Graph):
        return result
    if (
        isinstance(result, dict)
        and result
        and all(isinstance(each, xr.DataArray) for each in result.values())
    ):
        try:
            return xr.Dataset({str(name): array for name, array in result.items()})
        except ValueError:  # of xarray, which also names the axis
            raise AnalysisError(
                "the arrays do not have the same axes, so that they are no one Dataset; draw them one by one"
            ) from None
    kind = type(result).__name__
    if isinstance(result, list | tuple) and result:
        raise AnalysisError(
            f"a figure draws one result; got a {kind} of {len(result)}: hw.figure(results[0]) draws the first"
        )
    if hasattr(result, "to_xarray"):
        raise AnalysisError(f"a {kind} is drawn as hw.figure(table.to_xarray()), its index as the axes")
    if hasattr(result, "record"):
        raise AnalysisError(
            f"a {kind} has no numbers to draw; draw its record, hw.figure(model.record(text))"
        )
    if hasattr(result, "shape"):
        raise AnalysisError(
            f"a {kind} has no named axes; give xarray.DataArray(values, dims=('layer', 'head')) or the like"
        )
    raise AnalysisError(f"a figure draws arrays, Datasets, graphs, records and attention maps; got a {kind}")


def _known(chosen: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    wrong = [name for name in chosen if name not in names]
    if wrong:
        raise AnalysisError(f"a figure of it takes {', '.join(names)}; got {', '.join(wrong)}")
    return chosen


def _words(tokens: Iterable[Any]) -> list[str]:
    if isinstance(tokens, str):
        raise AnalysisError(f"tokens is a list with one text per token; got the text {tokens!r:.40}")
    if not isinstance(tokens, Iterable):
        raise AnalysisError(f"tokens is a list with one text per token; got {tokens!r:.40}")
    return [str(token) for token in tokens]
