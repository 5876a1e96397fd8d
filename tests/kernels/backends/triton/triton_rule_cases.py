"""What the Triton kernels take beyond plain masks, against the dense float64 reference; run by `test_triton.py`.

Edits whose heads, rows or conditions differ within a batch, key biases, ALiBi, normalisers that come to a sink or to a
bias, head widths and types, received mass of some queries, weights on chosen pairs. Outputs begin as NaN.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import Case, rich
from triton_checks import DEVICE, agree, close, expected

from headwater.kernels.attend import attend
from headwater.kernels.backends.choose import choose_for
from headwater.kernels.backends.triton import backend
from headwater.kernels.backends.triton.backend import Triton
from headwater.kernels.backends.triton.tile_sizes import Config
from headwater.kernels.edits.patterns import Fixed, Matching, Offset, OfMap, OnKeys, Uniform
from headwater.kernels.edits.scores import BiasKeys, BlockScores, EmphasiseScores, MaskScores, ScaleScores
from headwater.kernels.edits.weights import MixIdentity, MixPattern, Rescale, RowCondition, Shares
from headwater.kernels.maps import pairs, statistics
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

pytestmark = pytest.mark.usefixtures("poison")

TILES = Config(16, 16, 4, 1)


def everything(case: Case, names: tuple[str, ...] = (*backend.ROW, "received")) -> AttentionMap:
    """Output, lse, statistics of the forward pass and of the recorded map, against the reference."""
    row = [name for name in names if name in backend.ROW]
    result = Triton(TILES).attend(case.q, case.k, case.v, case.rule, case.edits, row, case.groups)
    dense = expected(case)
    close(result.z, dense.z, "z")
    close(result.lse, dense.lse, "lse")
    agree(result.found, dense, case)
    map = AttentionMap.of(case.q, case.k, case.rule, result.lse, result.steps, "triton")
    agree(map.statistics(names, case.groups), dense, case)
    return map


def two_rows(seed: int = 7, queries: int = 23, heads: int = 4) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(torch.randn(2, h, queries, 8, device=DEVICE) * 2 for h in (heads, 2, 2))


PER_ROW = torch.tensor([[True, False, True, False], [False, False, True, True]])


def test_edits_of_scores_differ_between_the_rows_of_a_batch():
    q, k, v = two_rows()
    queries, keys = (torch.arange(23)[None] % n == 0 for n in (2, 3))
    bias = torch.randn(2, 4, 23)
    bias[1, :, 5] = -torch.inf
    edits = (
        BiasKeys(PER_ROW, bias),
        ScaleScores(PER_ROW, 1.7),
        BlockScores(~PER_ROW, queries, keys),
        BiasKeys(PER_ROW[0], torch.randn(1, 23)),
    )
    rule = ScoreRule(0.3, Mask(23, 23, right=0), softcap=4.0, bias=torch.randn(1, 4, 1, 23), edits=edits)
    everything(Case(q, k, v, rule, (), torch.rand(3, 23) < 0.4))


def test_edits_of_weights_differ_between_rows_and_heads_and_have_conditions():
    q, k, v = two_rows(8)
    first, third = torch.arange(23)[None] < 6, torch.arange(23)[None] % 3 == 0
    rows = torch.rand(2, 4, 23) < 0.6
    condition = RowCondition(third, first | third, most=0.7, least=0.2)
    edits = (
        MixIdentity(~PER_ROW, 0.2, rows=rows[:, :1]),
        Rescale(PER_ROW, first, ~first, 0.4, rows=rows, condition=condition),
        Rescale(PER_ROW[:1], third, ~third & first, 0.5),
    )
    block = BlockScores(torch.ones(4, dtype=torch.bool), torch.arange(23)[None] == 4, first | True)
    rule = ScoreRule(0.3, Mask(23, 23, left=13, right=0), edits=(block,))
    case = Case(q, k, v, rule, edits, torch.rand(3, 23) < 0.4)
    map = everything(case)
    assert (map.stripe(0)[:, :, 4] == 0).all(), "a row without keys keeps nothing"


@pytest.mark.parametrize("few", [True, False], ids=["few keys", "many keys"])
def test_patterns_are_mixed_in_among_other_edits(few):
    """Output, statistics, products and received mass: one walk where few keys are edited, two where many are."""
    q, k, v = two_rows(10)
    first = torch.arange(23)[None] < 4 if few else torch.rand(2, 23) < 0.4
    valid = torch.arange(23) >= torch.tensor([[0], [5]])
    rule = ScoreRule(0.3, Mask(23, 23, left=17, right=0, valid_keys=valid, valid_queries=valid))
    other = attend(q.cpu(), k.cpu(), v.cpu(), replace(rule, scale=0.5))[1]
    ids = torch.randint(0, 3, (2, 21))
    edits = (
        MixPattern(PER_ROW, 0.3, Matching(ids)),
        Rescale(torch.tensor([True, True, False, True]), first, ~first, 0.4),
        MixIdentity(~PER_ROW, 0.2),
        MixPattern(PER_ROW[:1], 0.5, Uniform(), rows=torch.rand(2, 1, 23) < 0.6),
        MixPattern(~PER_ROW, 1.0, Offset(2)),
        MixPattern(PER_ROW, 0.4, OnKeys(first)),
        MixPattern(PER_ROW, 0.1, Fixed(torch.rand(1, 4, 23, 23))),
        Rescale(PER_ROW, ~first, first, 0.5),
    )
    if DEVICE == "cpu":
        edits += (MixPattern(~PER_ROW[1], 0.2, OfMap(other)),)
    case = Case(q, k, v, rule, edits, torch.rand(3, 23) < 0.4)
    dense = expected(case)
    dense = dense._replace(weights=dense.weights * valid[:, None, :, None])
    z, map = attend(q, k, v, rule, edits, "triton", (*backend.ROW,))
    assert choose_for(map).name == "triton"
    close(z[valid[:, None].expand(z.shape[:3])], dense.z[valid[:, None].expand(z.shape[:3])], "z")
    agree(map.statistics(statistics.NAMES, case.groups), dense, case)
    x, y = torch.randn(2, 4, 23, 3), torch.randn(2, 4, 23, 3)
    close(map @ x, dense.weights @ x.double(), "gather")
    close(map.T @ y, dense.weights.mT @ y.double(), "scatter")
    close(map.received(slice(3, 19)), dense.weights[:, :, 3:19].sum(-2), "received")
    ahead = torch.arange(23)[:, None] - torch.arange(23)
    later = (dense.weights * ((ahead >= 1) & (ahead <= 6))).sum(-2)
    close(map.received(later=(1, 6)), later, "received")


@pytest.mark.parametrize("kind", ["causal", "cross", "padded"])
def test_alibi(kind):
    case = rich(kind, DEVICE)
    everything(replace(case, rule=replace(case.rule, alibi=torch.tensor([0.5, 0.03]))))


@pytest.mark.parametrize("name", ["softmax1", "sinkhorn"])
def test_normalisers_that_come_to_a_sink_or_a_bias(name):
    q, k, v = two_rows(9)
    rule = ScoreRule(0.3, Mask(23, 23), normaliser=Normaliser(name))
    z, map = attend(q, k, v, rule, (), "triton")
    dense = reference.attend(q.cpu(), k.cpu(), v.cpu(), rule)
    close(z, dense.z, "z")
    close(map.statistic("row_mass"), dense.weights.sum(-1), "row_mass")
    close(map.statistic("received"), dense.weights.sum(-2), "received")


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_head_widths_and_types(width, dtype):
    torch.manual_seed(width)
    q, k, v = (torch.randn(1, h, 21, width, device=DEVICE).to(dtype) for h in (2, 1, 1))
    rule = ScoreRule(width**-0.5, Mask(21, 21, right=0))
    result = Triton(TILES).attend(q, k, v, rule, (), ("entropy", "max"))
    dense = reference.attend(q.cpu().float(), k.cpu().float(), v.cpu().float(), rule)
    close(result.z, dense.z, "z", {torch.float32: 1, torch.float16: 60, torch.bfloat16: 500}[dtype])
    close(result.lse, dense.lse, "lse")
    wanted = reference.statistics(dense, rule)
    for name in ("entropy", "max"):
        close(result.found[name], wanted[name], name)
    close(Triton(TILES).received(MapState(q, k, rule, result.lse)), wanted["received"], "received")


@pytest.mark.parametrize("kind", ["padded", "cache"])
def test_some_queries_and_chosen_pairs_of_a_map(kind):
    """The operator on the backend `triton`; strongest keys and cells go through blocks of rows on the same tensors."""
    case = rich(kind, DEVICE)
    result = Triton().attend(case.q, case.k, case.v, case.rule, case.edits)
    map = AttentionMap.of(case.q, case.k, case.rule, result.lse, result.steps, "triton")
    dense = expected(case)
    scattered = torch.arange(map.shape[2]) % 3 == 1
    for queries, mask in ((slice(5, 31), None), (scattered, scattered)):
        rows = torch.zeros(map.shape[2], dtype=torch.bool)
        rows[queries] = True
        for later in (None, (1, 9), (0, 0)):
            wanted, seen = reference.received(dense, case.rule, rows[None], later)
            close(map.received(queries, later), wanted, "received")
            assert torch.equal(map.visible(queries, later), seen)
            if mask is None:
                close(map.received(queries, later, heads=[1]), wanted[:, 1:], "received")
    columns = torch.randint(-2, map.shape[3] + 2, (len(case.q), 2, map.shape[2], 4))
    close(pairs.at(map, columns), reference.at(dense, case.rule, columns), "at")
    weights = map.dense()
    close(map.topk(3)[0], weights.cpu().topk(3, -1).values, "topk")
    assert map.pooled(8).shape == (len(case.q), 2, 5, -(-map.shape[3] // 8))
    close(map.pooled(map.shape[3], "max")[..., 0, 0], weights.amax((-1, -2)).cpu(), "pooled")


def test_the_window_of_the_clipped_distance():
    case = rich("window", DEVICE)
    result = Triton().attend(case.q, case.k, case.v, case.rule, case.edits, ("windowed_distance",))
    map = AttentionMap.of(case.q, case.k, case.rule, result.lse, result.steps, "triton", known=result.found)
    dense = expected(case)
    for window in (0, 3, statistics.WINDOW):
        wanted = reference.statistics(dense, case.rule, window=window)["windowed_distance"]
        close(map.statistic("windowed_distance", window=window), wanted, "distance")


@pytest.mark.parametrize("causal", [True, False])
def test_the_peer_of_the_gpu_benchmark_is_right_too(causal):
    path = Path(__file__).parents[4] / "benchmarks" / "tutorial_attention.py"
    if not path.exists():
        pytest.skip("benchmarks are not part of this distribution")
    spec = importlib.util.spec_from_file_location("tutorial_attention", path)
    assert spec
    assert spec.loader
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, 2, 256, 64, device=DEVICE) for _ in range(3))
    dense = reference.attend(
        q.cpu(), k.cpu(), v.cpu(), ScoreRule(0.125, Mask(256, 256, right=0 if causal else None))
    )
    z, lse = peer.attend(q, k, v, causal, 0.125)
    close(z, dense.z, "z")
    close(lse, dense.lse, "lse")
    with pytest.raises(ValueError, match="multiples of 128 tokens; got 250"):
        peer.attend(q[:, :, :250], k[:, :, :250], v[:, :, :250], causal, 0.125)


def test_what_it_leaves_to_other_backends_it_names():
    q = torch.randn(1, 2, 9, 4, device=DEVICE)
    rule = ScoreRule(1.0, Mask(9, 9))
    every, some = torch.ones(2, dtype=torch.bool), torch.ones(1, 9, dtype=torch.bool)
    shift = BiasKeys(every, torch.randn(1, 9))
    full = torch.randn(1, 1, 9, 9)
    for changes, reason in (
        ({"normaliser": Normaliser("sigmoid")}, "sigmoid weights"),
        ({"mask": Mask(9, 9, documents=torch.zeros(1, 9, dtype=torch.long))}, "document blocks"),
        ({"edits": (EmphasiseScores(every, some, some, 0.5),)}, "the score edit EmphasiseScores"),
        ({"edits": (MaskScores(every, lambda b, h, i, j: i == j),)}, "the score edit MaskScores"),
        ({"edits": (shift, ScaleScores(every, 0.0))}, "a key bias beside a temperature of 0 or less"),
        (
            {"edits": (ScaleScores(every, -1.0),), "bias": full},
            "a temperature of 0 or less over a score bias",
        ),
        ({"edits": (shift,), "bias": full}, "a key bias over a score bias that differs between queries"),
    ):
        assert Triton().why_not(q, q, replace(rule, **changes)) == reason
    assert Triton().why_not(q, q, rule, (Shares(every),)) == "the weight edit Shares"
    learned = replace(rule, alibi=torch.ones(2, requires_grad=True))
    assert Triton().why_not(q, q, learned) == "gradients of a score bias, of slopes or of learned sinks"
