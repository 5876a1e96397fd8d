"""Passes of eight threads under edits that change never reach one another; benchmarks/reliability.py runs 10,000."""

from __future__ import annotations

import pytest
from many_forwards import forwards


@pytest.mark.slow
def test_edits_of_other_threads_change_nothing() -> None:
    assert forwards(400) == {"forwards": 400, "threads": 8, "edits": 12, "contaminated": 0}
