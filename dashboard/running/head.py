"""What one head does: why it looks at a token, what it writes about the measure, and whether that is typical."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

import headwater as hw
from headwater.dashboard.running import runs
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State

STRONGEST = 10


def why(state: State, run: Run, query: int, key: int) -> pd.DataFrame:
    """The score of a pair as a sum over what the query and the key are made of, the largest terms first."""
    model = runs.model_of(state, run)
    with runs.editing(run):
        found = hw.analyses.qk_decomposition(
            model, run.example, head=f"{state.layer}.{state.head}", query=query, key=key
        )
    frame = found.isel(batch=0).to_dataframe("score").reset_index()[["query_part", "key_part", "score"]]
    return frame.iloc[np.argsort(-frame["score"].abs().to_numpy(), kind="stable")].reset_index(drop=True)


def writes(state: State, run: Run, measure: Measure) -> pd.DataFrame:
    """What the head moves into the logits of the measure, by the token that it is taken from."""
    model = runs.model_of(state, run)
    asked = {name: value for name, value in measure.of_run(run).settings.items() if name != "kind"}
    with runs.editing(run):
        found = hw.analyses.ov_decomposition(model, run.example, head=f"{state.layer}.{state.head}", **asked)
    values = found.isel(batch=0).sum("component").values
    place = np.arange(len(values))
    return pd.DataFrame({"position": place, "token": run.keys[: len(values)], "logit": values})


def recorded(state: State, run: Run, texts: Sequence[str]) -> list[hw.Record]:
    """Records of some texts by the model of a run, in which `typical` finds the pairs of any head."""
    model = runs.model_of(state, run)
    with runs.editing(run):
        return [model.record(text, statistics=("max",)) for text in texts]


def typical(records: Sequence[hw.Record], layer: int, head: int) -> pd.DataFrame:
    """The strongest pairs of a head over some texts, without what goes to the first token and to itself."""
    found = []
    for number, record in enumerate(records, 1):
        weights = record.pattern(layer, head)[0].numpy().copy()
        tokens = record.strings[0]
        weights[:, 0] = 0.0
        np.fill_diagonal(weights, 0.0)
        for flat in np.argsort(-weights, axis=None, kind="stable")[:3]:
            query, key = np.unravel_index(flat, weights.shape)
            found.append(
                (number, int(query), tokens[query], int(key), tokens[key], float(weights[query, key]))
            )
    frame = pd.DataFrame(found, columns=["text", "query", "query token", "key", "key token", "weight"])
    return frame.nlargest(STRONGEST, "weight").reset_index(drop=True)


def roles(scores: xr.DataArray, layer: int, head: int) -> pd.DataFrame:
    """How far the head does each simple job, and which share of the heads does it less."""
    mine = scores.sel(layer=layer).isel(head=head)
    below = (scores < mine).mean(("layer", "head"))
    return pd.DataFrame({"role": mine["role"].values, "score": mine.values, "above": below.values})
