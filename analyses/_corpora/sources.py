"""Texts of a corpus, one after the other: never more of a file in memory than one text, or one batch of rows.

A folder is read in the order of its files' names. Files of strangers are bounded: a text has a largest size, JSON is
strict, and every fault is one line that names the file and the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headwater.lens.errors import PromptError, nearest
from headwater.lens.files import as_path, as_text, parse_json

Unit = Literal["file", "paragraph"]
ENDINGS = (".jsonl", ".txt", ".parquet", ".arrow")
MOST_BYTES = 2**24  # of one text, or one line
BATCH = 256  # rows of a table that are read together
MARK = "dataset_info.json"  # what the datasets library writes beside its files


@dataclass(frozen=True)
class Row:
    """One text: its number in the corpus, where it stands, and what it says."""

    number: int
    where: str
    text: str


@dataclass(frozen=True)
class Source:
    """The texts of a file or a folder. `field` is the column or key with the text; `unit` says what a text of a .txt
    file is."""  # fmt: skip

    path: Path
    files: tuple[Path, ...]
    field: str
    unit: Unit

    @classmethod
    def of(cls, path: str | Path, field: str = "text", unit: Unit = "file") -> Source:
        """PromptError for what is no file or folder of texts."""
        found = as_path(path, PromptError)
        if unit not in ("file", "paragraph"):
            raise PromptError(f"a text of a .txt file is a 'file' or a 'paragraph'; got {unit!r}")
        if not found.exists():
            raise PromptError(f"there is no {found}; give a file or a folder of texts")
        if found.is_file():
            if found.suffix not in ENDINGS:
                raise PromptError(f"{found} is none of the files that are read: {', '.join(ENDINGS)}")
            return cls(found, (found,), field, unit)
        files = [each for each in sorted(found.rglob("*")) if each.suffix in ENDINGS and each.is_file()]
        inside = [each for each in files if each.resolve().is_relative_to(found.resolve())]
        if (found / MARK).exists():
            inside = [each for each in inside if each.suffix == ".arrow"]
        else:
            inside = [each for each in inside if each.suffix != ".arrow"]
        if not inside:
            raise PromptError(
                f"{found} holds no texts; it should hold files that end in {', '.join(ENDINGS)}"
            )
        return cls(found, tuple(inside), field, unit)

    def told(self) -> dict[str, Any]:
        """Plain data that tells this corpus from another one; its bytes are digested as they are read."""
        files = [[self._name(file), file.stat().st_size] for file in self.files]
        return {"files": files, "field": self.field, "unit": self.unit}

    def count(self) -> int:
        """How many texts there are, without reading one into memory whole."""
        return sum(_COUNT[file.suffix](file, self.unit) for file in self.files)

    def __iter__(self) -> Iterator[Row]:
        number = 0
        for file in self.files:
            for place, text in _READ[file.suffix](file, self.field, self.unit):
                yield Row(number, f"{self._name(file)}{place}", text)
                number += 1

    def _name(self, file: Path) -> str:
        return file.name if file == self.path else file.relative_to(self.path).as_posix()


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, each of a bounded length."""
    with _open(file) as source:
        number = 0
        while line := source.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise PromptError(
                    f"{file}, line {number} is longer than {MOST_BYTES // 2**20} MiB; divide it"
                )
            yield number, line


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise PromptError(f"{file} can not be read: {error.strerror or error}; give another path") from None


def _jsonl(file: Path, field: str, unit: Unit) -> Iterator[tuple[str, str]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        name = f"{file}, line {number}"
        found = parse_json(as_text(line, name, PromptError), name, PromptError, finite=False)
        text = found.get(field) if isinstance(found, dict) else found
        if not isinstance(text, str):
            keys = nearest(field, found) if isinstance(found, dict) else "give objects, or texts in quotes"
            raise PromptError(f"{name} has no text under {field!r}: {keys}")
        yield f":{number}", text


def _txt(file: Path, field: str, unit: Unit) -> Iterator[tuple[str, str]]:
    if unit == "file":
        with _open(file) as source:
            content = source.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise PromptError(f"{file} is longer than {MOST_BYTES // 2**20} MiB; read it by paragraphs")
        yield "", as_text(content, str(file), PromptError)
        return
    for number, lines in _paragraphs(file):
        yield f":{number}", as_text(b"".join(lines), f"{file}, line {number}", PromptError).strip("\r\n")


def _paragraphs(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    """The lines between blank lines, and the number of the first one."""
    lines, size, begin = [], 0, 1
    for number, line in _lines(file):
        if line.strip():
            begin = begin if lines else number
            lines.append(line)
            size += len(line)
            if size > MOST_BYTES:
                raise PromptError(
                    f"{file}, the paragraph at line {begin} is longer than {MOST_BYTES // 2**20} MiB"
                )
        elif lines:
            yield begin, lines
            lines, size = [], 0
    if lines:
        yield begin, lines


def _table(file: Path, field: str, unit: Unit) -> Iterator[tuple[str, str]]:
    number = 0
    for batch in _batches(file, field):
        for text in batch.to_pylist():
            number += 1
            if text is not None and not isinstance(text, str):
                raise PromptError(f"{file}, row {number}: {field!r} holds no text; name another column")
            yield f":{number}", text or ""


def _batches(file: Path, field: str) -> Iterator[Any]:
    """The column of texts in batches; pyarrow comes with the dashboard."""
    arrow = _arrow()
    try:
        if file.suffix == ".parquet":
            with arrow.parquet.ParquetFile(file) as table:
                _has(file, field, table.schema_arrow.names)
                for batch in table.iter_batches(BATCH, columns=[field]):
                    yield batch.column(0)
            return
        with arrow.memory_map(str(file)) as mapped:
            table = arrow.ipc.open_stream(mapped)
            _has(file, field, table.schema.names)
            for batch in table:
                for begin in range(0, len(batch), BATCH):
                    yield batch.column(field).slice(begin, BATCH)
    except (arrow.ArrowException, OSError) as error:
        raise PromptError(f"{file} can not be read: {' '.join(str(error).split())[:150]}") from None


def _has(file: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise PromptError(f"{file} has no column {field!r}: {nearest(field, names)}")


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise PromptError(
            "parquet and arrow files need pyarrow, which is missing; pip install 'headwater[dashboard]'"
        ) from None
    return pyarrow


def _rows_of(file: Path, unit: Unit) -> int:
    arrow = _arrow()
    try:
        if file.suffix == ".parquet":
            with arrow.parquet.ParquetFile(file) as table:
                return table.metadata.num_rows
        with arrow.memory_map(str(file)) as mapped:
            return sum(len(batch) for batch in arrow.ipc.open_stream(mapped))
    except (arrow.ArrowException, OSError) as error:
        raise PromptError(f"{file} can not be read: {' '.join(str(error).split())[:150]}") from None


_READ: dict[str, Callable[[Path, str, Unit], Iterator[tuple[str, str]]]] = {
    ".jsonl": _jsonl, ".txt": _txt, ".parquet": _table, ".arrow": _table,
}  # fmt: skip
_COUNT: dict[str, Callable[[Path, Unit], int]] = {
    ".jsonl": lambda file, unit: sum(1 for _, line in _lines(file) if line.strip()),
    ".txt": lambda file, unit: 1 if unit == "file" else sum(1 for _ in _paragraphs(file)),
    ".parquet": _rows_of, ".arrow": _rows_of,
}  # fmt: skip
