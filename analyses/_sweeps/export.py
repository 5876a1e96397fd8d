"""`export_sweep`: every number of a run as one table, a line each, in Parquet or CSV.

The files of the units are read twice, one after the other: for the columns, then for the lines. Neither the table nor
more than one result is in memory at a time.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import networkx as nx
import numpy as np
import xarray as xr

from headwater.analyses._sweeps.kept import KINDS
from headwater.analyses._sweeps.sweep_run import SweepRun
from headwater.lens.errors import SweepError
from headwater.lens.files import NewFile, as_path, unwritten
from headwater.lens.naming.cells import inert

UNIT = {
    "unit": int, "analysis": str, "settings": str, "reads": str, "at": int, "layers": str, "edits": str, "seed": int,
    "array": str,
}  # fmt: skip
ENDS = {"value": float, "words": str}
LINES = 2**16  # that are made at a time
GROUP = 2**18  # lines of a Parquet file that are written together
Cells = np.ndarray | list[Any]


@dataclass(frozen=True)
class Lines:
    """Some lines of one array: what they share, and the cells of each column in which they differ."""

    shared: dict[str, Any]
    cells: dict[str, Cells]
    count: int


Write = Callable[[Lines], None]


def export_sweep(
    run: SweepRun | str | os.PathLike[str], out: str | os.PathLike[str],
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> None:  # fmt: skip
    """Write the numbers of every finished unit to `out`, which ends in .parquet (needs pyarrow) or .csv.

    A line holds one number: what its unit is (`unit`, `analysis`, `settings` and `layers` as JSON, `reads` and `at`:
    which prompt, pair or text, `edits`, `seed`), the `array` of the result, its place there (`layer`, `head`, `query` …
    and their labels; of a graph `from` and `to`, or `node`), and `value` in float64, or `words` where it is no number.
    Columns that an array does not have are empty in its lines. Units that are queued or have failed have no lines.
    The file is there when it is whole. SweepError for another ending, a file that is not what was written, or no room.

    >>> import headwater as hw, pandas as pd, tempfile
    >>> sweep = hw.Sweep(
    ...     model="tasks-4l", prompts=["Mary gave John a drink"], analyses=[{"analysis": "rollout"}]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = hw.run_sweep(sweep, f"{folder}/run", workers=1)
    ...     hw.export_sweep(run, f"{folder}/all.csv")
    ...     table = pd.read_csv(f"{folder}/all.csv")
    >>> len(table), table.key_token.tolist()
    (6, ['<bos>', 'Mary', 'gave', 'John', 'a', 'drink'])
    """
    path = as_path(out, SweepError)
    if (writing := WRITERS.get(path.suffix)) is None:
        raise SweepError(f"{path} ends in neither .parquet nor .csv; give a file with one of these endings")
    found = run if isinstance(run, SweepRun) else SweepRun(run)
    counts = found.counts()
    try:
        with NewFile(path, SweepError) as new:
            about = {"run": found.manifest.digest, "results": found.digest(), **counts}
            with writing(new.file, _columns(found), about) as write:
                for done, (unit, result) in enumerate(found.results(), 1):
                    for lines in _lines(unit, result):
                        write(lines)
                    tell(done, counts["done"])
            new.finish()
    except OSError as error:
        raise unwritten(path, error, SweepError) from None


def _columns(run: SweepRun) -> dict[str, type]:
    """Every column, with the kind of its cells."""
    places: dict[str, type] = {}
    for _, result in run.results():
        for array in _arrays(result):
            for name, values in array.labels.items():
                whole, real = (np.can_cast(values.dtype, each) for each in (np.int64, np.float64))
                kind = int if whole else float if real else str
                before = places.setdefault(name, kind)
                if before is not kind:
                    places[name] = str if str in (before, kind) else float
    return UNIT | places | ENDS


@dataclass(frozen=True)
class _Array:
    """`values` of any shape; each label is of some of its axes, named in `axes`."""

    name: str
    values: np.ndarray
    labels: dict[str, np.ndarray]
    axes: dict[str, tuple[int, ...]]


def _arrays(result: Any) -> Iterator[_Array]:
    """The arrays of a result; each attribute of the nodes and of the edges of a graph is one."""
    if isinstance(result, nx.DiGraph):
        yield from _of_graph(["node"], [(_name(node), about) for node, about in result.nodes(data=True)])
        edges = [(_name(a), _name(b), about) for a, b, about in result.edges(data=True)]
        yield from _of_graph(["from", "to"], edges)
        return
    each = [result] if isinstance(result, xr.DataArray) else list(result.data_vars.values())
    for array in each:
        labels: dict[str, tuple[tuple[Any, ...], np.ndarray]] = {
            str(dim): ((dim,), np.arange(size))
            for dim, size in array.sizes.items()
            if dim not in array.coords
        }
        labels |= {str(name): (coord.dims, np.asarray(coord.values)) for name, coord in array.coords.items()}
        yield _Array(
            str(array.name or "value"),
            np.asarray(array.values),
            {_free(name): values for name, (_, values) in labels.items()},
            {_free(name): tuple(map(array.dims.index, dims)) for name, (dims, _) in labels.items()},
        )


def _of_graph(columns: Sequence[str], members: Sequence[tuple[Any, ...]]) -> Iterator[_Array]:
    for name in dict.fromkeys(name for *_, about in members for name in about):
        some = [member for member in members if name in member[-1]]
        values = np.empty(len(some), dtype=object)
        values[:] = [about[name] for *_, about in some]
        labels = {column: np.array([each[n] for each in some]) for n, column in enumerate(columns)}
        yield _Array(str(name), values, labels, dict.fromkeys(columns, (0,)))


def _lines(unit: dict[str, Any], result: Any) -> Iterator[Lines]:
    shared = {
        "unit": unit["number"],
        "analysis": unit["analysis"],
        "settings": json.dumps(unit["settings"]),
        "reads": unit["kind"],
        "at": unit["at"] if unit["kind"] else None,
        "layers": None if unit["layers"] is None else json.dumps(unit["layers"]),
        "edits": unit["edits"],
        "seed": unit["seed"],
    }
    for array in _arrays(result):
        flat = array.values.reshape(-1)
        for start in range(0, flat.size, LINES):
            some = flat[start : start + LINES]
            places = np.arange(start, start + some.size)
            at = np.unravel_index(places, array.values.shape) if array.values.ndim else ()
            cells: dict[str, Cells] = {
                name: values[tuple(at[axis] for axis in array.axes[name])]
                if array.axes[name]
                else np.repeat(values, some.size)
                for name, values in array.labels.items()
            }
            yield Lines(shared | {"array": array.name}, cells | _ends(some), some.size)


def _ends(values: np.ndarray) -> dict[str, Cells]:
    """Numbers in one column, and what is none in another."""
    if values.dtype.kind in KINDS:
        return {"value": values.astype(np.float64)}
    held = values.tolist()
    numbers = [float(each) if isinstance(each, bool | int | float) else None for each in held]
    words = [
        None if each is None or number is not None else _name(each)
        for each, number in zip(held, numbers, strict=True)
    ]
    return {"value": numbers, "words": words}


def _free(name: str) -> str:
    """A label may have the name of a column of the unit."""
    return f"{name}_" if name in UNIT or name in ENDS else name


def _name(given: Any) -> str:
    return given if isinstance(given, str) else json.dumps(given)


def _cast(cells: Cells, kind: type) -> list[Any]:
    """The cells as that kind; None where there is nothing, or a number that is undefined."""
    held = cells.tolist() if isinstance(cells, np.ndarray) else cells
    cast = _whole_text if kind is str else kind
    return [None if each is None or each != each else cast(each) for each in held]


def _whole_text(given: Any) -> str:
    """Half of a surrogate pair, which no file in UTF-8 can hold, becomes a question mark."""
    return str(given).encode("utf-8", "replace").decode()


@contextmanager
def _csv(file: BinaryIO, columns: dict[str, type], about: dict[str, Any]) -> Iterator[Write]:
    """Texts that a spreadsheet would run as formulas are made inert; a number that is undefined is an empty cell."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    rows = csv.writer(text)
    rows.writerow(map(inert, columns))

    def write(lines: Lines) -> None:
        each = [
            [inert(cell) for cell in _cast(lines.cells[name], kind)]
            if name in lines.cells
            else [inert(*_cast([lines.shared.get(name)], kind))] * lines.count
            for name, kind in columns.items()
        ]
        rows.writerows(zip(*each, strict=True))

    try:
        yield write
    except BaseException:
        with suppress(OSError):  # on a full disk what was not yet written can not be
            text.detach()
        raise
    text.detach()


@contextmanager
def _parquet(file: BinaryIO, columns: dict[str, type], about: dict[str, Any]) -> Iterator[Write]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise SweepError(
            "a .parquet file needs pyarrow, which is missing; pip install 'headwater[dashboard]', or write a .csv"
        ) from None
    kinds = {int: arrow.int64(), float: arrow.float64(), str: arrow.string()}
    schema = arrow.schema(
        [(name, kinds[kind]) for name, kind in columns.items()], {"headwater": json.dumps(about)}
    )
    held: list[Any] = []

    def column(cells: Cells, kind: type) -> Any:
        if kind is not str and isinstance(cells, np.ndarray) and cells.dtype.kind in KINDS:
            return arrow.array(cells, kinds[kind], from_pandas=True)  # what is undefined is empty
        return arrow.array(_cast(cells, kind), kinds[kind])

    def write(lines: Lines) -> None:
        each = [
            column(lines.cells[name], columns[name])
            if (name := field.name) in lines.cells
            else arrow.repeat(
                arrow.scalar(*_cast([lines.shared.get(name)], columns[name]), field.type), lines.count
            )
            for field in schema
        ]
        held.append(arrow.RecordBatch.from_arrays(each, schema=schema))
        if sum(batch.num_rows for batch in held) >= GROUP:
            flush()

    def flush() -> None:
        if held:
            rows.write_table(arrow.Table.from_batches(held, schema), row_group_size=GROUP)
            held.clear()

    rows = parquet.ParquetWriter(file, schema)
    try:
        yield write
        flush()
    except BaseException:
        with suppress(
            Exception
        ):  # else it would write its end when it is collected, to a file that is closed
            rows.close()
        raise
    rows.close()


WRITERS: dict[str, Callable[..., AbstractContextManager[Write]]] = {".parquet": _parquet, ".csv": _csv}
