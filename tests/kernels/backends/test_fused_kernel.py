"""Torch's fused kernel against the dense float64 reference: outputs, lse and maps.

Mutation seen to fail here: sink left out of lse.
"""

from __future__ import annotations

import torch
from attention_cases import cases, wanted
from comparison import close
from hypothesis import HealthCheck, given, settings

from headwater.kernels.attend import attend
from headwater.kernels.backends import fused_kernel
from headwater.kernels.reference import dense as reference

PROFILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROFILE
@given(cases(plain=True))
def test_flash_agrees_with_the_reference(case):
    reason = fused_kernel.why_not(case.q, case.k, case.rule)
    assert reason is None
    z, map = attend(case.q, case.k, case.v, case.rule, (), "flash")
    dense = reference.attend(case.q, case.k, case.v, case.rule)
    close(z, dense.z, 5, "z")
    silent = torch.isinf(map.lse)
    close(map.lse[~silent], dense.lse[~silent], 10, "lse")
    close(map.dense(), wanted(case).weights, 1, "map")
