"""Runs the cases of the Triton kernels in processes of their own: natively on a GPU, else in Triton's interpreter.

The cases try what a caller sees of `backend.py`, `launch.py`, `rows.py`, `columns.py` and `shared.py`.

The interpreter is chosen when the kernels are first imported, by an environment variable; hence the child process.
Mutations seen to fail there: entropy state not rescaled, window off by one, offset of the cache ignored, natural
log-sum-exp in a base-2 pass, key head taken modulo the group, sink left out of the output, end of a range included,
window of later queries off by one, mass kept on the own position forgotten when the next edit settles, interior of a
window begun too early, last row not stored (seen by the NaN poison), temperature of head 0 for all heads, temperature
of batch row 0 for all rows, condition of a weight edit ignored, slope of ALiBi without its sign, squared distance not
rescaled with the running maximum, distance clipped after the sum, key bias read at the columns of the first tile, the
right one of two neighbours taken for the largest, distances behind the query taken for those of a mask that looks
ahead, keys that are left out of the walk left out of the sum too, tiles after them counted twice, a negative scale
taken out of the maximum, learned sinks forgotten where a few keys are edited.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headwater.kernels.attend import attend
from headwater.kernels.backends.triton import backend
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    not backend.installed(), reason="triton is not installed: it comes for Linux alone"
)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("file", ["triton_cases.py", "triton_rule_cases.py"])
def test_the_kernels_agree_with_the_reference(file):
    environment = dict(os.environ)
    # the child is no worker of this run
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            HERE / file,
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parents[3],
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@needs_triton
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process has the interpreter switched on already"
)
def test_on_the_cpu_it_asks_for_the_interpreter():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="on the CPU unless TRITON_INTERPRET=1 is set before Python starts"):
        attend(q, q, q, ScoreRule(1.0, Mask(4, 4)), (), "triton")


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backend, "installed", lambda: False)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"pip install 'headwater\[triton\]'"):
        attend(q, q, q, ScoreRule(1.0, Mask(4, 4)), (), "triton")
    assert attend(q, q, q, ScoreRule(1.0, Mask(4, 4)))[0].shape == q.shape
