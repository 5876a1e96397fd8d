"""Downloads open safely elsewhere: no formulas in CSV, no NaN in JSON, nothing lost."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from headwater.dashboard.tables import pairs, per_token, said, table, to_csv, to_json


@pytest.mark.parametrize("token", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", '=HYPERLINK("http://x")'])
def test_csv_disarms_formulas(token):
    read = pd.read_csv(io.StringIO(to_csv(pd.DataFrame({"token": [token, "a,b"], "value": [-0.5, 1.0]}))))
    assert read["token"][0][0] == "'"
    assert read["token"][1] == "a,b"
    assert list(read["value"]) == [-0.5, 1.0]


def test_csv_keeps_a_zero_byte_visible():
    assert "␀" in to_csv(pd.DataFrame({"token": ["\x00"]}))


def test_json_has_null_for_missing_numbers_and_keeps_tokens():
    frame = pd.DataFrame({"token": ["</s>", "b"], "value": [np.nan, np.inf]})
    read = json.loads(to_json(frame))
    assert read[0] == {"token": "</s>", "value": None}
    assert read[1]["value"] is None


def test_table_has_one_line_per_number():
    values = xr.DataArray(
        np.arange(6.0).reshape(2, 3), dims=("layer", "head"), coords={"layer": [4, 5], "head": range(3)}
    )
    assert table(values, "entropy").iloc[-1].to_dict() == {"layer": 5, "head": 2, "entropy": 5}


def test_pairs_name_true_positions():
    frame = pairs(np.array([[0.25, 0.75]]), ["d"], ["b", "c"], 3, 1)
    assert frame.iloc[1].to_dict() == {
        "query": 3,
        "query_token": "d",
        "key": 2,
        "key_token": "c",
        "weight": 0.75,
    }


def test_what_is_no_number_is_said_in_words():
    assert [said(0.25), said(-3.0, "+.1f"), said(np.nan), said(np.inf, ".3g")] == [
        "0.25",
        "-3.0",
        "no value",
        "no value",
    ]


def test_per_token_numbers_positions():
    assert list(per_token(np.array([0.5, 0.5]), ["the", "the"], "share")["position"]) == [0, 1]
