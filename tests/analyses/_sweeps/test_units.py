"""Units follow from their numbers, and their numbers from what they read."""

import pytest
import sweep_engines

from headwater.lens.errors import SweepError

PAIR = {"clean": "Mary gave John a drink", "corrupt": "John gave Mary a drink"}


@pytest.mark.parametrize("texts", [None, 1, 3])
def test_every_unit_is_found_by_what_it_reads(texts):
    """Seen to fail where the last block is left out, and where the step is that of another kind."""
    sweep = sweep_engines.asked(
        prompts=["a", "b"] if texts is None else [], corpus=None if texts is None else "a.txt",
        pairs=[PAIR, PAIR], edits=sweep_engines.OFF, layers=[[0], [1, 2]],
        analyses=[{"analysis": "patch"}, {"analysis": "sink_rate", "each": {"threshold": [0.3, 0.5]}}],
    )  # fmt: skip
    units = sweep.units_of(texts)
    own = ("prompt", 2) if texts is None else ("text", texts)
    assert units.kinds() == {"pair": 2, own[0]: own[1]}
    found = {}
    for kind, count in units.kinds().items():
        for at in range(count):
            for number in units.of(kind, at):
                assert (units[number].kind, units[number].at, units[number].number) == (kind, at, number)
                found[number] = kind
    assert sorted(found) == list(range(len(units)))
    assert len(units) == 8 + 8 * own[1]


def test_a_unit_that_does_not_exist_is_refused():
    units = sweep_engines.asked().units_of(None)
    for number in (-1, 4):
        with pytest.raises(SweepError, match=f"unit {number} does not exist; the sweep has units 0 to 3"):
            units[number]
