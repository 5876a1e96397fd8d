"""The result of a unit as one safetensors file: its numbers as tensors, its names as JSON, bit for bit.

The same result gives the same bytes: they hold no time, no path and no name of a machine.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import networkx as nx
import numpy as np
import xarray as xr
from safetensors import SafetensorError, numpy as tensors

from headwater.lens.errors import SweepError
from headwater.lens.files import parse_json

FORMAT = "headwater-unit-1"
LONGEST_HEADER = 2**26
KINDS = "biuf"  # numpy's kinds of numbers that a tensor holds


def pack(result: Any, unit: Mapping[str, Any]) -> bytes:
    """The file's bytes; SweepError for a result that is neither arrays nor a graph."""
    numbers: dict[str, np.ndarray] = {}
    if isinstance(result, xr.DataArray):
        told: dict[str, Any] = {"kind": "array", "name": result.name}
        told |= _variables(result.to_dataset(name="array" if result.name is None else result.name), numbers)
        told["attrs"] = _plain(result.attrs)
    elif isinstance(result, xr.Dataset):
        told = {"kind": "dataset", **_variables(result, numbers), "attrs": _plain(result.attrs)}
    elif isinstance(result, nx.DiGraph):
        nodes = [[_plain(node), _plain(attrs)] for node, attrs in result.nodes(data=True)]
        edges = [[_plain(a), _plain(b), _plain(attrs)] for a, b, attrs in result.edges(data=True)]
        told = {"kind": "graph", "nodes": nodes, "edges": edges, "attrs": _plain(result.graph)}
    else:
        raise SweepError(f"a unit keeps arrays and graphs; {unit['analysis']} gave {type(result).__name__}")
    text = json.dumps({"format": FORMAT, "unit": unit, "result": told})
    # one entry alone: the library writes several in no fixed order
    return tensors.save(numbers, {"headwater": text})


def unpack(content: bytes, name: str) -> tuple[dict[str, Any], Any]:
    """The unit and its result. SweepError where the bytes are no file of a unit."""
    try:
        told, numbers = parse_json(_header(content), name, SweepError, finite=False), tensors.load(content)
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']!r:.40}")
        return told["unit"], READERS[told["result"]["kind"]](told["result"], numbers)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise SweepError(
            f"{name} is no file of a unit ({type(error).__name__}: {error!s:.80}); delete it"
        ) from None


def _header(content: bytes) -> str:
    """The one entry of the file's metadata."""
    (length,) = struct.unpack("<Q", content[:8])
    if length > LONGEST_HEADER:
        raise ValueError("its header is too long")
    return json.loads(content[8 : 8 + length])["__metadata__"]["headwater"]


def _variables(data: xr.Dataset, numbers: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is told of each variable; its numbers go to `numbers`, its texts stay."""
    told: dict[str, Any] = {"variables": {}, "coords": {}}
    for group, variables in (("variables", data.data_vars), ("coords", data.coords)):
        for name, array in variables.items():
            about: dict[str, Any] = {"dims": list(array.dims), "attrs": _plain(array.attrs)}
            values = np.asarray(array.values)
            if values.dtype.kind in KINDS:
                numbers[f"{group}/{name}"] = np.ascontiguousarray(values).reshape(values.shape)
            else:
                about |= {
                    "texts": [_text(name, each) for each in values.ravel()],
                    "shape": list(values.shape),
                }
                about |= {"of": "object" if values.dtype.kind == "O" else "text"}
            told[group][str(name)] = about
    return told


def _text(name: object, value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise SweepError(f"{name} holds a {type(value).__name__}, which no file keeps")


def _dataset(told: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> xr.Dataset:
    def array(group: str, name: str, about: Mapping[str, Any]) -> tuple[Any, ...]:
        if "texts" in about:
            values = np.array(about["texts"], dtype=object if about["of"] == "object" else str)
            values = values.reshape(about["shape"])
        else:
            values = numbers[f"{group}/{name}"]
        return about["dims"], values, about["attrs"]

    groups = [
        {name: array(group, name, about) for name, about in told[group].items()}
        for group in ("variables", "coords")
    ]
    return xr.Dataset(*groups, attrs=told["attrs"])


def _array(told: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> xr.DataArray:
    (name,) = told["variables"]
    found = _dataset({**told, "attrs": {}}, numbers)[name].rename(told["name"])
    found.attrs = dict(told["attrs"])
    return found


def _graph(told: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> nx.DiGraph:
    graph = nx.DiGraph(**told["attrs"])
    graph.add_nodes_from((_node(node), attrs) for node, attrs in told["nodes"])
    graph.add_edges_from((_node(a), _node(b), attrs) for a, b, attrs in told["edges"])
    return graph


READERS: dict[str, Callable[[Any, Any], Any]] = {"array": _array, "dataset": _dataset, "graph": _graph}


def _node(given: Any) -> Any:
    """A node as it was: what JSON writes as a list was a tuple."""
    return tuple(map(_node, given)) if isinstance(given, list) else given


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(name): _plain(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, np.ndarray | np.generic):
        return _plain(content.tolist())
    return _text("the result", content)
