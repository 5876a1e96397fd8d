"""A disk that is full while a record is written, wherever that happens: one line, and nothing is left.

Seen to fail: rows that grow in a temporary file without their error, files that are closed with unwritten rows.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models

import headwater as hw
from headwater.lens.errors import RecordError


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


@pytest.mark.parametrize("size", [0, 3_000, 9_000, 20_000])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("how", ["generate", "record", "save"])
def test_a_full_disk_is_one_line(model, how, named, size, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "run.safetensors" if named else None
    ids = tiny_models.batch(5, (60,))[0]
    more = {"keep_on": "disk", "path": path, "keep": ("qkv", "residual")}
    if how == "save":
        recorded = model.record(ids, keep=("qkv", "residual"))
        run = lambda: recorded.save(path or tmp_path / "run.safetensors")  # noqa: E731
    elif how == "record":
        run = lambda: model.record(ids, **more)  # noqa: E731
    else:
        run = lambda: model.generate(ids, 4, record=True, **more)  # noqa: E731
    with room(size), pytest.raises(RecordError, match=r"can not write .* give ") as told:
        run()
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())
