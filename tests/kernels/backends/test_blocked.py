"""Blocks of rows against the dense float64 reference: outputs, maps and statistics, and laws of edits.

Mutations seen to fail here: window off by one, lower-right instead of upper-left alignment, key offset ignored, gain
computed after the keys were scaled.
"""

from __future__ import annotations

from attention_cases import cases, wanted
from comparison import close
from hypothesis import HealthCheck, given, settings, strategies as st
from limits import block_elements

from headwater.kernels.attend import attend
from headwater.kernels.maps import statistics
from headwater.kernels.reference import dense as reference

PROFILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROFILE
@given(cases(), st.sampled_from([1, 40, 2**19]))
def test_blocked_agrees_with_the_reference(case, elements):
    with block_elements(elements):
        z, map = attend(case.q, case.k, case.v, case.rule, case.edits, "blocked")
        dense = wanted(case)
        close(z, reference.attend(case.q, case.k, case.v, case.rule, case.edits).z, 5, "z")
        close(map.dense(), dense.weights, 1, "map")
        expected = reference.statistics(dense, case.rule, case.groups)
        found = map.statistics(statistics.NAMES, case.groups)
        assert set(found) == set(expected)
        for name in found:
            if name != "argmax":
                close(
                    found[name],
                    expected[name],
                    {
                        "distance": 40,
                        "distance_squared": 2000,
                        "windowed_distance": 10,
                        "lse": 10,
                        "entropy": 10,
                        "received": 33,
                    }.get(name, 1),
                    name,
                )
        places = found["argmax"]
        assert ((places >= 0) == (expected["argmax"] >= 0)).all()
        top = dense.weights.gather(-1, places.clamp_min(0)[..., None])[..., 0]
        close(top[places >= 0], expected["max"][places >= 0], 1, "argmax")


@PROFILE
@given(cases(edited=True))
def test_edited_rows_keep_their_mass(case):
    plain = reference.attend(case.q, case.k, case.v, case.rule).weights.sum(-1)
    _, map = attend(
        case.q, case.k, case.v, case.rule, tuple(e for e in case.edits if hasattr(e, "keep")), "blocked"
    )
    mass = map.statistic("row_mass")
    kept = ~mass.isnan()
    close(mass[kept], plain[kept], 1, "row mass")
