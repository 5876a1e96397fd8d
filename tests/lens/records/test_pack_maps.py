"""Score rules, masks, normalisers and edits of every kind, packed as data and back."""

from __future__ import annotations

import json

import pytest
import torch
from record_files import recorded

from headwater.kernels.attend import attend
from headwater.kernels.edits import patterns
from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.kernels.edits.scores import BiasKeys, BlockScores, EmphasiseScores, MaskScores, ScaleScores
from headwater.kernels.edits.weights import MixIdentity, MixPattern, Rescale, RowCondition, ScaleKeys
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.pair_rules import BlockList, Dilated, Listed, Tree, Windows
from headwater.lens.errors import RecordError
from headwater.lens.records.pack_maps import Packer, unpack

TAMPERED = [
    (Dilated(torch.zeros(2, 1).long(), 2, 3), {"step": 0}),
    (Windows(torch.zeros(2, 1).long(), 0, (3, 3), (2, 2), (0, 0)), {"sizes": [0, 3]}),
    (Windows(torch.zeros(2, 1).long(), 0, (3, 3), (2, 2), (0, 0)), {"windows": [2]}),
    (Listed(torch.zeros(2, 1).long(), torch.ones(1, 1, 9, 9) > 0), {"shown": {"tensor": "m.q"}}),
    (Tree(torch.zeros(2, 1).long(), torch.tensor([0, 1]), torch.eye(2) > 0), {"below": {"tensor": "one"}}),
    (BlockList(torch.zeros(2, 1).long(), 3, torch.eye(3) > 0), {"starts": {"tensor": "five"}}),
    (Dilated(torch.zeros(2, 1).long(), 2, 3), {"type": "AttentionMap"}),
]


@pytest.mark.parametrize(("rule", "changed"), TAMPERED)
@pytest.mark.parametrize("as_mask", [False, True])
def test_a_rule_of_pairs_comes_back_and_one_that_was_tampered_with_does_not(rule, changed, as_mask):
    q = torch.randn(1, 2, 9, 4)
    mask = Mask(9, 9, right=0, extra=rule if as_mask else None)
    edits = () if as_mask else (MaskScores(torch.tensor([True, False]), rule),)
    map = attend(q, q, q, ScoreRule(0.3, mask, edits=edits))[1]
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(Packer(tensors.__setitem__).pack(map, "m")))
    assert unpack(packed, tensors).dense().equal(map.dense())
    tensors |= {"one": torch.ones(1, 1) > 0, "five": torch.zeros(2, 5).long()}
    place = packed["rule"]["mask"]["extra"] if as_mask else packed["rule"]["edits"][0]["visible"]
    place |= changed
    with pytest.raises((KeyError, TypeError, ValueError)):
        unpack(packed, tensors)


def test_rules_and_edits_of_every_kind_come_back(tmp_path):
    """Normalisers, slopes, documents and every edit that is no function, in one map each."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(3))
    heads = torch.tensor([True, False, True, True])
    keys, rows = torch.arange(9)[None] < 2, torch.arange(9)[None] > 3
    weights: tuple = (
        Rescale(heads, keys, ~keys, 0.3, rows[:, None], RowCondition(keys, ~keys, 5.0, 0.01)),
        MixIdentity(heads, 0.1),
        ScaleKeys(heads, keys, 1.5),
        MixHeads(torch.rand(1, 4, 4, generator=generator), torch.rand(2, 9, 4, 4, generator=generator)),
        MixPattern(heads, 0.2, patterns.Fixed(torch.rand(1, 1, 9, 9, generator=generator))),
        MixPattern(heads, 0.2, patterns.Matching(torch.tensor([[1, 2, 1, 2, 3, 1, 2, 1, 1]]))),
        MixPattern(heads, 0.1, patterns.Offset(1), rows[:, None]),
        MixPattern(heads, 0.1, patterns.Uniform()),
    )
    scores: tuple = (
        ScaleScores(heads, 1.5),
        BlockScores(heads, rows, keys),
        BiasKeys(heads, torch.randn(1, 9, generator=generator)),
        EmphasiseScores(heads, rows, keys, 0.5),
        ConvolveScores(torch.rand(1, 4, 2, 3, generator=generator), 1),
        MixHeads(torch.rand(2, 4, 4, generator=generator)),
        MaskScores(heads, Dilated(torch.zeros(2, 1, dtype=torch.long), 3, 2)),
    )
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    mask = Mask(9, 9, right=0, left=6, documents=documents)
    rules = [
        ScoreRule(0.3, mask, softcap=3.0, sinks=torch.randn(4), bias=torch.randn(1, 4, 9, 9), edits=scores)
    ]
    rules += [ScoreRule(0.3, Mask(9, 9, right=0), alibi=torch.rand(4))]
    rules += [
        ScoreRule(0.3, Mask(9, 9, right=0), normaliser=Normaliser(name))
        for name in ("softmax1", "sigmoid", "cog", "softplus", "lssa", "elu1", "linear")
    ]
    rules += [ScoreRule(0.3, Mask(9, 9), normaliser=Normaliser("sinkhorn"))]
    record = recorded("gpt2")
    for rule in rules:
        map = attend(q, k, v, rule, weights if rule.normaliser is None else ())[1]
        other = MixPattern(heads, 0.5, patterns.OfMap(map))
        for found in (map, attend(q, k, v, ScoreRule(0.3, Mask(9, 9, right=0)), (other,))[1]):
            tensors: dict[str, torch.Tensor] = {}
            packed = json.loads(json.dumps(Packer(tensors.__setitem__).pack(found, "m")))
            assert unpack(packed, tensors).dense().equal(found.dense())
    seen = MaskScores(heads, lambda b, h, i, j: (i - j) % 2 == 0)
    record.maps[0] = attend(q, k, v, ScoreRule(0.3, Mask(9, 9, right=0), edits=(seen,)))[1]
    with pytest.raises(RecordError, match=r"keep=\(\)"):
        record.save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
