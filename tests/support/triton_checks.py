"""Comparing the Triton kernels with the dense reference: tolerances and devices."""

from __future__ import annotations

from dataclasses import replace

import torch
from attention_cases import Case
from comparison import within

from headwater.kernels.reference import dense as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# by how many roundings of a weight each sum may be off
SLACK = {
    "distance": 40, "distance_squared": 2000, "windowed_distance": 10, "lse": 10, "entropy": 10, "received": 33,
    "z": 5, "gather": 5, "scatter": 33,
}  # fmt: skip


def close(actual, expected, name, scale=1.0):
    within(actual, expected, 3e-5 * scale * SLACK.get(name, 1), 3e-5 * scale, name)


def on_device(case: Case, dtype: torch.dtype) -> Case:
    """q, k, v in the type under test; the reference gets the same rounded numbers."""
    q, k, v = (x.to(DEVICE, dtype) for x in (case.q, case.k, case.v))
    return replace(case, q=q, k=k, v=v)


def expected(case: Case) -> reference.Dense:
    q, k, v = (x.cpu().float() for x in (case.q, case.k, case.v))
    return reference.attend(q, k, v, case.rule, case.edits)


def real_rows(case: Case, weights: torch.Tensor) -> torch.Tensor:
    valid = case.rule.mask.valid_queries
    return weights if valid is None else weights * valid[:, None, :, None]


def agree(found, dense, case, scale=1.0):
    wanted = reference.statistics(dense, case.rule, case.groups)
    for name, values in found.items():
        if name != "argmax":
            close(values, wanted[name], name, scale)
    if "argmax" in found:
        place = found["argmax"].cpu()
        assert ((place >= 0) == (wanted["argmax"] >= 0)).all()
        top = dense.weights.gather(-1, place.clamp_min(0)[..., None])[..., 0]
        close(top[place >= 0], wanted["max"][place >= 0], "argmax", scale)
