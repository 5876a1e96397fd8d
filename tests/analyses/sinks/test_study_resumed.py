"""A redistribution study that is stopped and taken up again: the same numbers, bit for bit, and nothing run twice.

Mutations seen to fail: pieces kept under one name for all chunks, the line that was cut short kept, a changed line
believed, values of the plain texts not compared, the filter's pieces taken for the study's.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import headwater as hw
from headwater.analyses.sinks import _redistributed_runs
from headwater.analyses.sinks.redistribution_study import redistribution_study
from headwater.lens.errors import AnalysisError
from headwater.lens.journal import Journal

SETTINGS: dict[str, Any] = {
    "keep": "0 0.5", "heads": "0.1 1.0 2.2", "threshold": 0.2, "controls": 2, "draws": 20, "batch_size": 3,
}  # fmt: skip
IDS = torch.randint(3, 61, (4, 10), generator=torch.Generator().manual_seed(4))


def study(model: hw.HookedModel, **more: Any) -> xr.Dataset:
    return redistribution_study(model, IDS, **(SETTINGS | {"held_out": IDS[:1]} | more))


class Stop(Exception):
    pass


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Counts the forward passes under edits, and stops before pass number `after`."""
    plain = _redistributed_runs.Redistributions._values

    def begin(after: int | None) -> list[int]:
        seen: list[int] = []

        def counted(self: Any, begun: Any, batch: Any, jobs: Any) -> list[float]:
            if len(seen) == after:
                raise Stop
            seen.append(len(jobs))
            return plain(self, begun, batch, jobs)

        monkeypatch.setattr(_redistributed_runs.Redistributions, "_values", counted)
        return seen

    return begin


@pytest.mark.slow
def test_stopped_by_an_error_at_any_place(pairs: Callable, tmp_path: Path, passes: Callable) -> None:
    model = pairs("gpt2").model
    seen = passes(None)
    whole = study(model)
    total = len(seen)
    assert total > 20
    for after in (0, 5, total - 1):
        file = tmp_path / f"{after}.study"
        seen = passes(after)
        with pytest.raises(Stop):
            study(model, resume=file)
        assert len(seen) == after
        seen = passes(None)
        again = study(model, resume=str(file))
        assert len(seen) == total - after
        xr.testing.assert_identical(again, whole)
    seen = passes(0)
    xr.testing.assert_identical(study(model, resume=file), whole)  # finished: nothing runs
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{n}.study" for n in (0, 5, total - 1))


SCRIPT = """
import os, signal, sys
import headwater as hw
from headwater.lens.journal import Journal
put, seen = Journal.put, []
def killed(self, name, value):
    put(self, name, value)
    seen.append(name)
    if len(seen) == 4:
        with open(sys.argv[1], "a") as file:  # as a line that the end of the process cut short
            file.write('{"piece": "[\\\\"study/0')
        os.kill(os.getpid(), signal.SIGKILL)
Journal.put = killed
hw.analyses.redistribution_study(
    hw.load("sink-2l-softmax"), ["A dog ran to the house .", "The sun is"], keep="0 0.5", rule=None, keys=[0],
    controls=1, draws=9, batch_size=2, resume=sys.argv[1],
)
"""


@pytest.mark.slow
def test_killed(tmp_path: Path, passes: Callable) -> None:
    file = tmp_path / "killed.study"
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(file)], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-500:]
    lines = file.read_bytes().split(b"\n")
    assert len(lines) == 1 + 4 + 1
    assert lines[-1]
    settings: dict[str, Any] = {
        "keep": "0 0.5", "rule": None, "keys": [0], "controls": 1, "draws": 9, "batch_size": 2,
    }  # fmt: skip
    model, texts = hw.load("sink-2l-softmax"), ["A dog ran to the house .", "The sun is"]
    seen = passes(None)
    whole = redistribution_study(model, texts, **settings)
    total = len(seen)
    seen = passes(None)
    again = redistribution_study(model, texts, resume=file, **settings)
    assert len(seen) == total - 3  # four pieces: what the first texts are as they are, and three passes
    # another process may have shared its sums among threads in another way
    np.testing.assert_allclose(again.effect, whole.effect, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(again.freed, whole.freed, rtol=1e-5, atol=1e-6)


def test_what_is_of_another_study_or_was_changed_is_refused(
    pairs: Callable, tmp_path: Path, passes: Callable
) -> None:
    model, file = pairs("gpt2").model, tmp_path / "run.study"
    small: dict[str, Any] = {"held_out": None, "keep": "0.5", "heads": "0.1"}
    study(model, resume=file, **small)
    content = file.read_bytes()
    measure: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits[:, -1, 5]  # noqa: E731
    other: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits[:, -1, 6]  # noqa: E731
    refused = [
        ({"seed": 1}, "is of another run .seed is 0 there and 1 here"),
        ({"keep": "0.25"}, "keep is .0.5. there and .0.25. here"),
        ({"heads": "0.2"}, "heads is"),
        ({"batch_size": 2}, "batch_size is 3 there and 2 here"),
        ({"measure": measure}, "is of another run"),
    ]
    for settings, message in refused:
        with pytest.raises(AnalysisError, match=message) as caught:
            study(model, resume=file, **(small | settings))
        assert "\n" not in str(caught.value)
    with pytest.raises(AnalysisError, match="texts is"):
        redistribution_study(model, IDS.flip(0), **(SETTINGS | small), resume=file)
    with model.edit(hw.ScaleHeads({"0.0": 0.5})), pytest.raises(AnalysisError, match="edits is"):
        study(model, resume=file, **small)
    with pytest.raises(AnalysisError, match=r"is of another run .model is"):
        study(pairs("llama").model, resume=file, **small)
    assert file.read_bytes() == content
    named = tmp_path / "measure.study"
    study(model, measure=measure, resume=named, **small)
    with pytest.raises(AnalysisError, match="other values of the measure on the plain texts"):
        study(model, measure=other, resume=named, **small)
    for place, line in ((2, "line 2"), (3, "line 3")):
        lines = content.split(b"\n")
        lines[place - 1] = lines[place - 1].replace(b'"piece": "[', b'"piece": "[ ', 1)
        changed = tmp_path / f"changed{place}.study"
        changed.write_bytes(b"\n".join(lines))
        with pytest.raises(AnalysisError, match=f"was changed in {line}; delete it"):
            study(model, resume=changed, **small)
    for name, held in (
        ("list", b"[]\n"),
        ("text", b"a text"),
        ("bytes", b"\x80\x04\n\xff"),
        ("other", b"{}\n"),
    ):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(AnalysisError, match="is no file of finished pieces"):
            study(model, resume=tmp_path / name, **small)
        assert (tmp_path / name).read_bytes() == held
    with pytest.raises(AnalysisError, match="is a link or no plain file"):
        study(model, resume=tmp_path, **small)
    with pytest.raises(AnalysisError, match=r"can not write .*nowhere.*: No such file"):
        study(model, resume=tmp_path / "nowhere" / "run.study", **small)


def test_numbers_come_back_as_the_same_bits(tmp_path: Path) -> None:
    numbers = [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("nan"), float("inf"), 1 / 3]
    with Journal.open(tmp_path / "file", {"a": 1}, AnalysisError) as journal:
        journal.put("x", numbers)
    with Journal.open(tmp_path / "file", {"a": 1}, AnalysisError) as journal:
        assert np.array(journal.get("x")).tobytes() == np.array(numbers).tobytes()
        assert journal.get("y") is None
    assert all(json.loads(line)["sha256"] for line in (tmp_path / "file").read_text().splitlines())
    (tmp_path / "empty").touch()
    with Journal.open(tmp_path / "empty", {"a": 1}, AnalysisError) as journal:
        assert journal.get("x") is None
