"""The table of a run has every number of every result, at its place, in Parquet as in CSV, and is whole or not there.

Seen to fail with the axes of an array in the wrong order, and with a file that is written in its place.
"""

from __future__ import annotations

import json
import resource
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import sweep_engines
import xarray as xr
from sweep_engines import Here, asked, open_once

import headwater as hw
from headwater.analyses._sweeps import export
from headwater.lens.errors import SweepError

ANALYSES = [
    {"analysis": "raw_attention", "settings": {"over": "max"}},
    {"analysis": "sink_rate", "each": {"threshold": [0.3, 0.5]}},
    {"analysis": "find_sinks"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hw.SweepRun]:
    with pytest.MonkeyPatch.context() as patched:
        open_once(patched)
        patched.setattr(
            "headwater.analyses._sweeps.run_sweep._engine", lambda kind, setup, *_: Here(setup, {})
        )
        sweep = asked(analyses=ANALYSES, layers=[[0, 1], [3]], edits=sweep_engines.OFF)
        yield hw.run_sweep(sweep, tmp_path_factory.mktemp("export") / "a.run", workers=1)


def read(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False, na_values=[""])
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pandas()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_every_number_stands_at_its_place(run: hw.SweepRun, tmp_path: Path, ending: str) -> None:
    hw.export_sweep(run, tmp_path / f"all.{ending}")
    table = read(tmp_path / f"all.{ending}")
    checked = 0
    for unit, result in run.results():
        lines = table[table.unit == unit["number"]]
        assert set(lines.analysis) == {unit["analysis"]}
        assert set(lines.edits) == {unit["edits"]}
        assert json.loads(lines.settings.iloc[0]) == unit["settings"]
        assert json.loads(lines.layers.iloc[0]) == unit["layers"]
        arrays = [result] if isinstance(result, xr.DataArray) else list(result.data_vars.values())
        assert len(lines) == sum(array.size for array in arrays)
        for array in arrays:
            own = lines[lines.array == array.name]
            if array.dtype.kind in "biuf":
                np.testing.assert_array_equal(own.value, array.values.ravel().astype(float))
            else:
                assert own.words.tolist() == array.values.ravel().tolist()
            for dim in array.dims:
                wanted = array[dim].broadcast_like(array).transpose(*array.dims).values.ravel()
                assert own[dim].tolist() == wanted.tolist(), dim
            checked += 1
    assert checked > len(run.units)


def results(*each: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    about = {"analysis": "a", "settings": {}, "kind": "", "at": 0, "layers": None, "edits": "none", "seed": 0}
    return iter([({"number": n, **about}, result) for n, result in enumerate(each)])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_graphs_single_values_odd_labels_and_texts(
    run: hw.SweepRun, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = nx.DiGraph()
    graph.add_node(("q", 1), score=0.5, role=None)
    graph.add_edge(("q", 1), "=1+1", score=-2, why="\ud800")
    each = [
        graph,
        xr.DataArray(np.float32(0.1)),
        xr.DataArray([1, 2], dims="unit", coords={"unit": ["x", None], "one": 3}),
        xr.Dataset({"a": ("unit", [np.nan]), "b": ((), "=1")}, {"one": "three"}),
    ]
    monkeypatch.setattr(hw.SweepRun, "results", lambda self: results(*each))
    hw.export_sweep(run, tmp_path / f"all.{ending}")
    table = read(tmp_path / f"all.{ending}").astype(object)
    mark = "'" if ending == "csv" else ""  # a spreadsheet would run it as a formula
    shown = table[["unit", "array", "node", "from", "to", "unit_", "one", "value", "words"]]
    assert shown.where(shown.notna(), None).values.tolist() == [
        [0, "score", '["q", 1]', None, None, None, None, 0.5, None],
        [0, "role", '["q", 1]', None, None, None, None, None, None],
        [0, "score", None, '["q", 1]', f"{mark}=1+1", None, None, -2.0, None],
        [0, "why", None, '["q", 1]', f"{mark}=1+1", None, None, None, "?"],
        [1, "value", None, None, None, None, None, float(np.float32(0.1)), None],
        [2, "value", None, None, None, "x", "3", 1.0, None],
        [2, "value", None, None, None, None, "3", 2.0, None],
        [3, "a", None, None, None, "0", "three", None, None],
        [3, "b", None, None, None, None, "three", None, f"{mark}=1"],
    ]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_table(
    run: hw.SweepRun, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen results of 2,500 numbers take what four take."""
    monkeypatch.setattr(export, "LINES", 1000)
    monkeypatch.setattr(export, "GROUP", 2000)
    one = xr.DataArray(np.random.default_rng(0).normal(size=2500), dims="key")

    def most(count: int) -> int:
        monkeypatch.setattr(hw.SweepRun, "results", lambda self: results(*[one] * count))
        tracemalloc.start()
        hw.export_sweep(run, tmp_path / f"all.{ending}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(1)
    few = most(4)
    assert most(16) < 1.5 * few
    if ending == "parquet":
        groups = pytest.importorskip("pyarrow.parquet").ParquetFile(tmp_path / "all.parquet").metadata
        assert groups.num_rows == 40_000
        assert groups.row_group(0).num_rows == 2000
        assert json.loads(groups.metadata[b"headwater"])["results"] == run.digest()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_that_can_not_be_written_leaves_the_old_one(
    run: hw.SweepRun, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"all.{ending}"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(SweepError, match="can not write"):
            hw.export_sweep(run, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert not list(tmp_path.glob("*.part"))
    changed = hw.SweepRun(shutil.copytree(run.path, tmp_path / "changed.run"))
    file = changed.file(changed.table().key[1])
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SweepError, match="another file than the one that was written"):
        hw.export_sweep(changed.path, path)
    assert path.read_text() == "old"


def test_bad_calls_are_one_line(run: hw.SweepRun, tmp_path: Path) -> None:
    for out, told in (("a.txt", "neither .parquet nor .csv"), ("absent/a.csv", "does not exist")):
        with pytest.raises(SweepError, match=told):
            hw.export_sweep(run, tmp_path / out)
    with pytest.raises(SweepError, match="holds no run"):
        hw.export_sweep(tmp_path, tmp_path / "a.csv")
