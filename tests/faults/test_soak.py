"""Long work takes no more memory as it goes on; benchmarks/reliability.py does thousands of units and texts.

Seen to fail with a worker that keeps the records of its units.
"""

from __future__ import annotations

import pytest
import soak

MOST_KB = 30.0  # that a unit or text may add: few of them say little


@pytest.mark.slow
def test_memory_stays_where_it_is_over_units_and_texts() -> None:
    for found in (soak.sweep(150), soak.corpus(150)):
        assert found["kb_each"] < MOST_KB, found
