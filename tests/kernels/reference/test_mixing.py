"""The dense mixtures on numbers that can be followed by hand."""

from __future__ import annotations

import torch

from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.kernels.reference.mixing import convolved, heads_mixed
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


def test_a_mixture_is_by_the_new_head_and_then_the_old():
    x = torch.tensor([[[[1.0, -torch.inf]], [[10.0, 20.0]]]])
    by_key = torch.zeros(1, 2, 2, 2)
    by_key[0, 1, 1, 1] = 1
    found = heads_mixed(x, MixHeads(torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]), None, by_key))
    assert found.tolist() == [[[[21.0, -torch.inf]], [[30.0, 80.0]]]]


def test_a_convolution_reaches_back_in_queries_and_both_ways_in_keys():
    scores = torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 7.0]]]])
    kernel = torch.tensor([[[[2.0, 3.0, 5.0], [11.0, 13.0, 17.0]]]])
    seen = torch.ones(1, 1, 3, 3) > 0
    found = convolved(scores, ConvolveScores(kernel, 1), ScoreRule(1.0, Mask(3, 3)), seen)
    # the 1 at (0, 0) is the own key of column 0 and the key before for column 1; the 7 is ahead of column 1
    assert found[0, 0].tolist() == [[3.0, 5.0, 0.0], [13.0, 17.0, 0.0], [0.0, 14.0, 21.0]]
