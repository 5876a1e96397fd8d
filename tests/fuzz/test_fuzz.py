"""Files that were changed at random give an answer or one line; inputs that once did not are tried again.

`make fuzz` tries each kind for a minute.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_targets import TARGETS
from fuzzing import FOUND, fault_of, found, tried


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_changed_files(name: str, tmp_path: Path) -> None:
    assert tried(name, TARGETS[name](tmp_path), tmp_path) > 0


@pytest.mark.parametrize("name", [name for name in TARGETS if found(name)])
def test_inputs_that_were_found(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)
    for path in found(name):
        assert fault_of(target, path) == "", path


def test_every_input_that_is_kept_is_tried() -> None:
    assert {path.name for path in FOUND.glob("*")} <= set(TARGETS)
