"""`Head`, written `5.1` for layer 5, head 1 (both count from 0), and the ways to name several heads or layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.lens.errors import HeadError


class Head(NamedTuple):
    """One attention head, written `layer.head`; layers and heads count from 0, heads are query heads.

    >>> import headwater as hw
    >>> hw.Head.parse("5.1")
    Head(layer=5, head=1)
    """

    layer: int
    head: int

    @classmethod
    def parse(cls, text: str | Head | tuple[int, int]) -> Head:
        """The head that `text` names. HeadError where it names none."""
        if isinstance(text, tuple) and len(text) == 2 and all(isinstance(n, int) for n in text):
            return cls(*text)
        if isinstance(text, str) and (match := re.fullmatch(r"\s*(\d{1,5})\.(\d{1,5})\s*", text)):
            return cls(int(match[1]), int(match[2]))
        raise HeadError(f"a head is written 'layer.head', as in '5.1'; got {text!r}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


Heads = str | Head | Iterable["str | Head | int"] | Tensor | np.ndarray | xr.DataArray
Layers = str | int | Iterable[int]
HeadNames = str | Sequence[str | Head]  # "5.1 6.0", or one by one


def chosen(heads: Heads, layers: Layers, model_layers: list[int], n_heads: int) -> dict[int, Tensor]:
    """The chosen heads as {layer: bool [head]}; layers without a chosen head are left out.

    `heads` is one of: "all"; one head ("5.1" or `Head(5, 1)`); a list of heads; a mask, bool [layer, head], over the
    layers that have attention; flat indices over [layer, head], as `importance.values.ravel().argsort()[:8]` gives
    them; a DataArray with the coordinates `layer` and `head`, such as a stacked result that was sorted or cut. `layers`
    limits all of these. HeadError lists every head or layer that does not exist.
    """
    allowed = set(chosen_layers(layers, model_layers))
    plain = as_data(heads)
    if plain == "all":
        return {layer: torch.ones(n_heads, dtype=torch.bool) for layer in sorted(allowed)}
    found = _listed(plain, model_layers, n_heads)
    _refuse_missing(found, model_layers, n_heads, "the model")
    masks: dict[int, Tensor] = {}
    for layer, head in found:
        if layer in allowed:
            masks.setdefault(layer, torch.zeros(n_heads, dtype=torch.bool))[head] = True
    return masks


def named(given: HeadNames, layers: list[int], n_heads: int, of: str = "the model") -> list[Head]:
    """The heads of "5.1 5.4" or ["5.1", "5.4"], in order, without repeats; HeadError lists those not in the model."""
    listed = given.replace(",", " ").split() if isinstance(given, str) else given
    found = list(dict.fromkeys(map(Head.parse, listed)))
    _refuse_missing(found, layers, n_heads, of)
    return found


def every_head(layers: list[int], n_heads: int) -> list[Head]:
    return [Head(layer, head) for layer in layers for head in range(n_heads)]


def _refuse_missing(heads: list[Head], layers: list[int], n_heads: int, of: str) -> None:
    if wrong := [str(h) for h in heads if h.layer not in layers or h.head >= n_heads]:
        raise HeadError(
            f"no such head: {', '.join(wrong)}; {of} has layers {_span(layers)} with heads 0 to {n_heads - 1}"
        )


def as_data(heads: Any) -> Any:
    """The heads as JSON data: "all", a list of names such as "5.1", a list of flat indices, or the rows of a mask."""
    if isinstance(heads, str):
        return heads if heads == "all" else [str(Head.parse(heads))]
    if isinstance(heads, Head) or (isinstance(heads, tuple) and _all_ints(heads) and len(heads) == 2):
        return [str(Head.parse(heads))]
    if isinstance(heads, xr.DataArray):
        return _of_result(heads)
    if isinstance(heads, Tensor | np.ndarray):
        return _of_array(heads)
    if not isinstance(heads, Iterable) or isinstance(heads, dict):
        raise HeadError(f"heads are 'all', '5.1', a list of such, a mask or flat indices; got {heads!r}")
    listed = list(heads)
    if listed and all(isinstance(h, list) for h in listed):  # a mask read from JSON
        try:
            return _of_array(np.asarray(listed))
        except ValueError:
            raise HeadError("a mask of heads has rows of equal length; got others") from None
    if listed and _all_ints(listed):
        return [int(h) for h in listed]
    return [str(Head.parse(h)) for h in listed]  # type: ignore[arg-type]


def _of_result(heads: xr.DataArray) -> list:
    if heads.ndim == 1 and {"layer", "head"} <= set(heads.coords):
        places = zip(heads["layer"].values, heads["head"].values, strict=True)
        return [f"{int(layer)}.{int(head)}" for layer, head in places]
    if heads.dtype == bool and heads.dims != ("layer", "head"):
        raise HeadError(
            f"a mask of heads has the dimensions layer and head; got {', '.join(map(str, heads.dims))}"
        )
    return _of_array(heads.values)


def _of_array(array: Tensor | np.ndarray) -> list:
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if array.dtype == bool and array.ndim == 2:
        return array.tolist()
    if array.ndim == 1 and (np.issubdtype(array.dtype, np.integer) or not array.size):
        return [int(n) for n in array]
    raise HeadError(
        f"an array of heads is a mask, bool [layer, head], or flat indices such as "
        f"importance.values.ravel().argsort()[:8]; got {array.dtype} {list(array.shape)}"
    )


def _listed(plain: list, model_layers: list[int], n_heads: int) -> list[Head]:
    """The heads that `as_data` describes, whether they exist or not."""
    if plain and isinstance(plain[0], list):
        if np.shape(plain) != (len(model_layers), n_heads):
            raise HeadError(
                f"a mask of heads must be [{len(model_layers)} layers, {n_heads} heads]; got {list(np.shape(plain))}"
            )
        return [Head(model_layers[i], h) for i, row in enumerate(plain) for h, on in enumerate(row) if on]
    if plain and isinstance(plain[0], int):
        wrong = [n for n in plain if not 0 <= n < len(model_layers) * n_heads]
        if wrong:
            raise HeadError(
                f"no head has the flat index {', '.join(map(str, wrong))}; {len(model_layers)} layers × {n_heads} "
                f"heads go from 0 to {len(model_layers) * n_heads - 1}"
            )
        return [Head(model_layers[n // n_heads], n % n_heads) for n in plain]
    return [Head.parse(h) for h in plain]


def _all_ints(values: Iterable) -> bool:
    return all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in values)


def chosen_layers(layers: Layers, model_layers: list[int]) -> list[int]:
    """The chosen layers; HeadError lists every one that the model does not have."""
    if isinstance(layers, str):
        if layers == "all":
            return model_layers
        raise HeadError(f"layers are 'all', a number or a list of numbers; got {layers!r}")
    try:
        asked = [layers] if isinstance(layers, int) else list(layers)
    except TypeError:
        raise HeadError(f"layers are 'all', a number or a list of numbers; got {layers!r}") from None
    wrong = [n for n in asked if n not in model_layers]
    if wrong:
        raise HeadError(
            f"no attention in layer {', '.join(map(str, wrong))}; the model has layers {_span(model_layers)}"
        )
    return asked


def _span(layers: list[int]) -> str:
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
