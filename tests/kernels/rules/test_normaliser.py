"""Laws and closed forms of each normaliser, and each against the dense formulas.

Mutations seen to fail here: Cog without its sign, no lower bound on Z under identity features, softplus replaced by its
argument, elu without its 1, a sink not put through f, softmax1 in the place of a learned sink, LSSA that counts hidden
keys.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from comparison import near
from small_maps import CAUSAL, FULL, HEADS, WIDTH, N, dense, fitting, map_of, problem
from wide_cases import NORMALISERS

from headwater.kernels.attend import attend
from headwater.kernels.edits.scores import BiasKeys, BlockScores
from headwater.kernels.edits.weights import MixIdentity
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

EVERY = pytest.mark.parametrize("kind", NORMALISERS, ids=str)


@EVERY
@pytest.mark.parametrize("mask", ["fitting", "padded", "packed"])
def test_each_is_what_the_dense_formulas_say(kind, mask):
    """With learned sinks, a bias, ALiBi and a moved cache where the normaliser takes them."""
    q, k, v = problem(size=4.0)
    valid = torch.arange(N)[None] >= torch.tensor([[0], [3]])
    one_way = kind.name != "sinkhorn"
    made = {
        "fitting": Mask(N, N - 2, right=0, query_offset=2, key_offset=3) if one_way else Mask(N, N - 2),
        "padded": Mask(N, N - 2, valid_keys=valid[:, : N - 2], valid_queries=valid),
        "packed": replace(
            fitting(kind), keys=N - 2, key_offset=1, documents=(torch.arange(N) >= 4).long()[None]
        ),
    }[mask]
    sinks = torch.linspace(-2, 3, HEADS).double() if one_way else None
    bias = torch.randn(1, 1, N, N - 2).double()
    rule = ScoreRule(0.4, made, None, sinks, bias, (), kind, torch.rand(HEADS).double() / 4)
    k, v = k[:, :, : N - 2], v[:, :, : N - 2]
    z, map = attend(q, k, v, rule, (), "blocked")
    expected = reference.attend(q, k, v, rule)
    near(z, expected.z, 1e-9)
    real = expected.lse > -torch.inf
    real = real if made.valid_queries is None else real & made.valid_queries[:, None]
    near(map.lse[real], expected.lse[real], 1e-9)
    near(dense(map), expected.weights * real[..., None], 1e-9)


def test_cog_weights_have_size_one_and_the_sign_of_their_scores():
    q, k, _ = problem()
    weights = dense(map_of(CAUSAL, Normaliser("cog")))
    near(weights.abs().sum(-1), torch.ones(2, HEADS, N), 1e-12)
    scores = (q @ k.repeat_interleave(2, 1).mT).tril()
    assert (weights.sign() == scores.sign()).all()
    assert (weights < 0).any()


@pytest.mark.parametrize("backend", ["flash", "blocked", "reference"])
def test_softmax1_is_a_sink_logit_of_zero(backend):
    """On top of learned sinks too: exp(0) is added to what the sink adds."""
    q, k, v = (x.float() for x in problem())
    sinks = torch.linspace(-1, 2, HEADS)
    for given, same in ((None, torch.zeros(HEADS)), (sinks, torch.log1p(sinks.exp()))):
        one = ScoreRule(0.4, CAUSAL, sinks=given, normaliser=Normaliser("softmax1"))
        z, map = attend(q, k, v, one, (), backend)
        scores = (0.4 * q @ k.repeat_interleave(2, 1).mT).masked_fill(
            torch.ones(N, N).triu(1) > 0, -torch.inf
        )
        extra = same[None, :, None, None].expand(2, -1, N, 1)
        weights = torch.cat([extra, scores], -1).softmax(-1)[..., 1:]
        near(map.dense(), weights, 1e-6)
        near(z, weights @ v.repeat_interleave(2, 1), 1e-5)


def test_a_sigmoid_weight_is_its_own_scores_alone():
    kind = Normaliser("sigmoid", bias=-math.log(N))
    q, k, v = problem()
    weights = dense(map_of(CAUSAL, kind))
    fewer = dense(map_of(Mask(N, 4, right=0), kind, (q, k[:, :, :4], v[:, :, :4])))
    near(weights[..., :4], fewer, 1e-15)
    equal = dense(map_of(CAUSAL, kind, (0 * q, k, v)))
    near(equal, torch.ones(N, N).double().tril().expand_as(equal) / (1 + N), 1e-12)
    near(map_of(CAUSAL, kind).lse, torch.zeros(2, HEADS, N), 0)


@pytest.mark.parametrize("kind", [Normaliser("sigmoid_normalised", bias=-40), Normaliser("elu1")], ids=str)
def test_far_below_zero_it_is_the_softmax(kind):
    """There sigma(s) and elu(s) + 1 are both exp(s)."""
    low = BiasKeys(torch.ones(HEADS) > 0, torch.full((1, N), -40.0))
    near(dense(map_of(CAUSAL, kind, edits=(low,))), dense(map_of(CAUSAL, None)), 1e-9)


def test_lssa_forgets_the_lengths_of_queries_and_keys():
    q, k, v = problem()
    kind = Normaliser("lssa")
    weights = dense(map_of(CAUSAL, kind))
    longer = (q * torch.rand(2, HEADS, N, 1).add(0.1), k * torch.rand(2, 2, N, 1).add(0.1), v)
    near(dense(map_of(CAUSAL, kind, longer)), weights, 1e-12)
    # a query along its own key, the other one across: scores ln(8) ln(2) and 0
    q, k = torch.zeros(1, 1, 2, WIDTH), torch.eye(WIDTH)[None, None, :2]
    q[..., 1] = 3.0
    found = dense(map_of(Mask(2, 2, right=0), kind, (q, k, k)))[0, 0]
    own, other = math.log1p(math.exp(math.log(8) * math.log(2))), math.log(2)
    near(found[1], torch.tensor([other, own]) / (own + other), 1e-6)
    assert found[0].tolist() == [pytest.approx(1, abs=1e-6), 0]


@pytest.mark.parametrize("features", ["elu1", "relu", "identity"])
def test_linear_attention_is_a_running_sum(features):
    """Katharopoulos et al.: phi(q_i) times the sum over the keys so far of phi(k_j) v_j."""
    phi = {"elu1": lambda x: torch.nn.functional.elu(x) + 1, "relu": torch.relu, "identity": lambda x: x}[
        features
    ]
    q, k, v = problem()
    map = map_of(CAUSAL, Normaliser("linear", features=features))
    q, k, v = phi(q), phi(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    state = (k[..., :, None] * v[..., None, :]).cumsum(2)
    total = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    z = torch.einsum("bhnd,bhnde->bhne", q, state)
    z = z / (total.abs().clamp_min(1) if features == "identity" else total)[..., None]
    z = z.nan_to_num(0.0)  # a query without a positive feature in common with any key
    assert map.signed == (features == "identity")
    near(attend(*problem(), ScoreRule(0.4, CAUSAL, normaliser=Normaliser("linear", features=features)))[0], z)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_extreme_scores(kind, dtype, size):
    """Equal rows, and scores of ten thousand: weights stay finite, no larger than 1 in size where Z bounds them."""
    q, k, v = (x.to(dtype) for x in problem(size=size))
    # the linear kinds are no softmax: their weights grow with the scores
    map = map_of(fitting(kind), kind, (q, k, v))
    weights = dense(map)
    assert weights.isfinite().all()
    hidden = torch.ones(N, N).triu(1) > 0 if kind.name != "sinkhorn" else torch.zeros(N, N) > 0
    assert (weights[..., hidden] == 0).all()
    assert attend(q, k, v, ScoreRule(0.4, fitting(kind), normaliser=kind))[0].isfinite().all()
    if kind.bounded:
        assert (weights.abs() <= 1).all()
    summing = kind.bounded and kind.name not in ("sigmoid", "softmax1", "cog", "softplus")
    if summing and size:
        near(weights.sum(-1), torch.ones(2, HEADS, N), 1e-2)
    if not size and summing:
        counts = torch.full((N,), N) if kind.name == "sinkhorn" else torch.arange(1, N + 1)
        near(weights.sum(-1), torch.ones(2, HEADS, N), 1e-5)
        near(weights[0, 0, :, 0], 1 / counts, 1e-5)


@EVERY
def test_rows_that_see_nothing_have_no_weights(kind):
    """Padding, an edit that hides a whole row, no keys at all: zero output, NaN statistics, and edits add nothing."""
    mask = fitting(kind)
    q, k, v = problem()
    valid = torch.arange(N)[None] >= torch.tensor([[0], [N]])
    some = torch.ones(HEADS) > 0
    block = BlockScores(some, torch.arange(N)[None] == 4, torch.ones(1, N) > 0)
    rule = ScoreRule(0.4, replace(mask, valid_keys=valid), normaliser=kind, edits=(block,))
    z, map = attend(q, k, v, rule, (MixIdentity(some, 0.5),))
    assert (z[1] == 0).all()
    assert (z[0, :, 4] == 0).all()
    assert (dense(map)[1] == 0).all()
    assert (dense(map)[0, :, 4] == 0).all()
    assert torch.isinf(map.lse[0, :, 4]).all()
    found = map.statistics(("max", "row_mass", "lse", "argmax"))
    assert found["max"][0, :, 4].isnan().all()
    assert found["row_mass"][1].isnan().all()
    assert (found["argmax"][1] == -1).all()
    assert found["max"][0, :, :4].isfinite().all()
    empty = Mask(N, 0)
    z, map = attend(q, k[:, :, :0], v[:, :, :0], ScoreRule(0.4, empty, normaliser=kind))
    assert (z == 0).all()
    assert torch.isinf(map.lse).all()


@EVERY
def test_gradients_of_every_normaliser(kind):
    """By finite differences, through a score edit and a learned sink where the normaliser takes one."""
    q, k, v = (x[:1, :, :4, :3].contiguous().requires_grad_() for x in problem())
    sinks = None if kind.name == "sinkhorn" else torch.randn(HEADS).double().requires_grad_()
    mask = Mask(4, 4, right=None if kind.name == "sinkhorn" else 0)
    bias = BiasKeys(torch.ones(HEADS) > 0, torch.randn(1, 4).double())
    # relu has corners and cog a jump at 0; the drawn scores are not there
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)

    def output(q, k, v, sinks=None):
        rule = ScoreRule(0.4, mask, sinks=sinks, normaliser=kind, edits=(bias,))
        return attend(q, k, v, rule, (), "blocked")[0]

    assert torch.autograd.gradcheck(output, leaves, eps=1e-6, atol=1e-5, fast_mode=True)


def test_names_and_parameters_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"unknown normaliser 'sparsemax'; there are softmax, softmax1"):
        Normaliser("sparsemax")
    with pytest.raises(ValueError, match=r"cog takes no parameters; got bias=1\.0"):
        Normaliser("cog", bias=1.0)
    with pytest.raises(ValueError, match=r"odd number of iterations.*got 4"):
        Normaliser("sinkhorn", iterations=4)
    with pytest.raises(ValueError, match="features must be one of elu1, relu, identity; got 'mlp'"):
        Normaliser("linear", features="mlp")
    for mask, sinks, reason in (
        (CAUSAL, None, "a causal or windowed mask"),
        (Mask(N, N, extra=lambda b, h, i, j: i == j), None, "a mask given as a function"),
        (FULL, torch.zeros(HEADS), "learned sinks"),
    ):
        with pytest.raises(ValueError, match=f"sinkhorn can not compute {reason}"):
            map_of(mask, Normaliser("sinkhorn"), sinks=sinks)
