"""Where a record is kept while the model runs: on the model's device, in CPU memory, or in a file, layer by layer."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from headwater.lens.attention import context
from headwater.lens.errors import RecordError
from headwater.lens.files import as_path
from headwater.lens.mixers.reading import reading
from headwater.lens.models import residual_stream
from headwater.lens.records.memory import Estimate, header_size
from headwater.lens.records.record import Record
from headwater.lens.records.recorder import Recorder
from headwater.lens.records.safetensors_file import RecordFile
from headwater.lens.records.save_open import RecordWriter, joined, open_record

KeepOn = Literal["device", "cpu", "disk"]


@dataclass
class Destination:
    """The file of one run, if it has one, with a writer for each part."""

    file: RecordFile | None = None
    writers: dict[str, RecordWriter] = field(default_factory=dict)
    temporary: bool = False  # unlinked as soon as the record is open, so it vanishes with the process

    def finish(self, record: Record, main: str) -> Record:
        """The finished record, opened from its file if it has one; `main` names its part."""
        if self.file is None:
            return record
        parts = {name: self.writers[name].about(part) for name, part in record.parts.items()}
        path = self.file.finish(joined(self.writers[main].about(record), parts))
        opened = open_record(path, Record, most_whole=0)
        if self.temporary:
            path.unlink()
        return opened


@contextlib.contextmanager
def keeping(
    recorders: Mapping[str, Recorder], keep_on: KeepOn, path: str | Path | None, cost: Estimate
) -> Iterator[Destination]:
    """Check that there is room, and set where each recorder keeps its tensors."""
    kept = Destination()
    check(keep_on, path)
    with contextlib.ExitStack() as stack:
        if keep_on == "disk":
            kept.temporary = path is None
            place = (
                Path(tempfile.mkdtemp(prefix="headwater-")) / "record.safetensors"
                if path is None
                else as_path(path, RecordError)
            )
            if kept.temporary:
                stack.callback(place.parent.rmdir)
                stack.callback(place.unlink, missing_ok=True)
            cost.check_disk(place.parent)
            kept.file = stack.enter_context(RecordFile(place, header_size(recorders)))
        else:
            cost.check()
        for i, (name, recorder) in enumerate(recorders.items()):
            if kept.file is not None:
                kept.writers[name] = RecordWriter(kept.file.add, "" if i == 0 else f"part.{i}.")
                recorder.writer = kept.writers[name]
            elif keep_on == "cpu":
                recorder.device = torch.device("cpu")
        yield kept


@contextlib.contextmanager
def listening(recorders: Mapping[str, Recorder]) -> Iterator[None]:
    """Inside, the recorders get the attention of every layer, and the residual stream and mixers if they keep them."""
    with contextlib.ExitStack() as stack:
        for recorder in recorders.values():
            stack.enter_context(context.listening(recorder))
            if recorder.keeps_residuals:
                stack.enter_context(residual_stream.listening(recorder.source, recorder.take_residual))
            if recorder.keeps_mixers:
                recorder.effective = stack.enter_context(reading(recorder.source, {}))
        yield


def check(keep_on: str, path: str | Path | None) -> None:
    """RecordError for an unknown `keep_on`, or a `path` without `keep_on="disk"`."""
    if keep_on not in ("device", "cpu", "disk"):
        raise RecordError(f"keep_on must be 'device', 'cpu' or 'disk'; got {keep_on!r}")
    if path is not None and keep_on != "disk":
        raise RecordError(
            f"path={str(path)!r} is for keep_on='disk'; give that, or save the record afterwards"
        )
