"""Numbers behind a figure as CSV or JSON that other programs can open safely.

Token text can begin with ``=``, ``+``, ``-`` or ``@``, which spreadsheets would run as a formula, so such cells get a
leading apostrophe in CSV. JSON has no NaN: a missing number becomes null.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from headwater.lens.naming.cells import inert


def table(values: xr.DataArray, name: str = "value") -> pd.DataFrame:
    """One line per number, its coordinates first."""
    return values.rename(name).to_dataframe().reset_index().dropna(subset=[name])


def to_csv(frame: pd.DataFrame) -> str:
    safe = frame.copy()
    for column in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[column]):
            safe[column] = [inert(value) for value in safe[column]]
    safe.columns = [inert(str(column)) for column in safe.columns]
    return safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def to_json(content: Any) -> str:
    return json.dumps(_plain(content), allow_nan=False, ensure_ascii=True, indent=1)


def _plain(content: Any) -> Any:
    if isinstance(content, pd.DataFrame):
        return [_plain(line) for line in content.to_dict("records")]
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple, set, np.ndarray)):
        return [_plain(value) for value in content]
    if isinstance(content, np.generic):
        content = content.item()
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content if isinstance(content, (str, int, float, bool)) or content is None else str(content)


def per_token(values: np.ndarray, tokens: Sequence[str], name: str) -> pd.DataFrame:
    return pd.DataFrame({"position": np.arange(len(tokens)), "token": list(tokens), name: values})


def said(value: float, form: str = ".2f") -> str:
    """A number in a sentence; "no value" where it is none, as the mean of nothing is.

    >>> said(0.25), said(float("nan"))
    ('0.25', 'no value')
    """
    return f"{value:{form}}" if np.isfinite(value) else "no value"


def extremes(frame: pd.DataFrame, name: str, count: int = 3) -> str:
    """The largest numbers of a column in words, each with the cells before it."""
    values = pd.Series(pd.to_numeric(frame[name], errors="coerce"))
    best = values.abs().sort_values(ascending=False, kind="stable").index[:count]
    told = [f"{_place(frame, at, name)} {values[at]:.4g}" for at in best if np.isfinite(values[at])]
    return f"largest: {', '.join(told)}"


def _place(frame: pd.DataFrame, at: Any, name: str) -> str:
    return " ".join(str(frame[column][at]) for column in list(frame)[:4] if column != name)


def pairs(
    weights: np.ndarray,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    first_query: int = 0,
    first_key: int = 0,
) -> pd.DataFrame:
    """One line per query and key of a map or of a window of it that begins at these positions."""
    query, key = (place.ravel() for place in np.indices(weights.shape))
    return pd.DataFrame(
        {
            "query": query + first_query,
            "query_token": np.asarray(query_tokens, dtype=object)[query],
            "key": key + first_key,
            "key_token": np.asarray(key_tokens, dtype=object)[key],
            "weight": weights.ravel(),
        }
    )
