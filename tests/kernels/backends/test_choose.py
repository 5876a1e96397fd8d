"""Which backend is taken, and the words in which one that is asked for by name refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from limits import most_calls
from small_maps import CAUSAL, N, fitting, problem
from wide_cases import NORMALISERS

from headwater.kernels.attend import attend
from headwater.kernels.backends import fused_kernel
from headwater.kernels.backends.choose import choose
from headwater.kernels.backends.triton.backend import Triton, installed
from headwater.kernels.edits.patterns import Uniform
from headwater.kernels.edits.scores import EmphasiseScores
from headwater.kernels.edits.weights import MixPattern, Rescale
from headwater.kernels.rules.prepare import prepare
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


def test_a_backend_asked_for_by_name_refuses_by_name():
    q = torch.randn(1, 1, 9, 4)
    rule = ScoreRule(1.0, Mask(9, 9, left=2, right=0))
    with pytest.raises(ValueError, match="sliding window"):
        attend(q, q, q, rule, (), "flash")
    backend, reason = choose(q, q, rule)
    assert backend.name == "blocked"
    assert "sliding window" in reason
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        attend(q, q, q, rule, (), "fast")


def test_auto_takes_few_calls_and_leaves_many_to_blocks():
    q = torch.randn(1, 2, 600, 8)
    rule, heads = ScoreRule(0.3, Mask(600, 600, right=0)), torch.tensor([True, False])
    positions = torch.arange(600)[None]
    one = Rescale(heads, positions < 4, positions >= 4, 0.5)
    many = [Rescale(heads, positions % n == 0, positions % n != 0, 0.5) for n in (2, 3, 5)]
    with most_calls(6):
        assert choose(q, q, rule, (one,)).backend.name == "flash"
        backend, reason = choose(q, q, rule, many)
        assert backend.name == "blocked"
        assert "8 calls" in reason
        with pytest.raises(ValueError, match="flash can not compute edits that take 8 calls"):
            choose(q, q, rule, many, "flash")
    emphasis = EmphasiseScores(heads, positions < 9, positions < 9, 0.5)
    with pytest.raises(ValueError, match="the score edit EmphasiseScores"):
        choose(q, q, replace(rule, edits=(emphasis,)), (), "flash")


def test_fused_kernels_refuse_by_name_and_auto_takes_blocks():
    q, k, v = (x.float() for x in problem())
    for kind in NORMALISERS:
        rule = ScoreRule(0.4, fitting(kind), normaliser=kind)
        prepared = prepare(q, k, rule)[2]
        if prepared.normaliser is None:
            continue
        backend, reason = choose(q, q, prepared)
        if kind.name == "linear":
            assert (backend.name, reason) == ("running", "linear attention as running sums")
        else:
            assert (backend.name, reason) == (
                "blocked",
                f"flash can not compute {prepared.normaliser.name} weights",
            )
        with pytest.raises(ValueError, match=f"can not compute {prepared.normaliser.name} weights"):
            attend(q, k, v, rule, (), "flash")
    documents = replace(CAUSAL, documents=torch.zeros(1, N, dtype=torch.long))
    assert fused_kernel.why_not(q, q, ScoreRule(0.4, documents)) == "document blocks"
    if installed():
        assert Triton().why_not(q.double(), k.double(), ScoreRule(0.4, CAUSAL)) is not None


def test_auto_takes_the_fused_kernel_for_what_a_pattern_leaves_to_it():
    q = torch.randn(1, 2, 40, 8)
    heads, first = torch.tensor([True, False]), (torch.arange(40) < 2)[None]
    edits = (MixPattern(heads, 0.5, Uniform()), Rescale(heads, first, ~first, 0.5))
    assert choose(q, q, ScoreRule(0.3, Mask(40, 40, right=0)), edits).backend.name == "flash"
    backend, reason = choose(q, q, ScoreRule(0.3, Mask(40, 40, left=7, right=0)), edits)
    assert (backend.name, "sliding window" in reason) == ("blocked", True)
