"""Mixed heads and neighbouring pairs as their papers write them, pair by pair, and refused by name elsewhere.

tests/kernels/backends/test_wide_rules.py holds them to the dense reference among all other rules and edits. Seen to
fail: heads read at the columns of another head, neighbours on the wrong side, a head without weights that gives some to
others, negative mixtures that are not signed.
"""

from __future__ import annotations

import pytest
import torch
from comparison import near
from limits import block_elements
from small_edits import ALL, CAUSAL, EVERY, HEADS, N, dense, operands, run

from headwater.kernels.attend import attend
from headwater.kernels.backends.choose import choose
from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.kernels.edits.scores import BlockScores, ScaleScores
from headwater.kernels.edits.weights import MixIdentity, Rescale
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

LATER = torch.ones(N, N).triu(1) > 0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_talking_heads_are_two_linear_maps_over_heads():
    """Shazeer et al. 2020: J = QK·P_l, W = softmax(J)·P_w, O = W·V."""
    q, k, v = operands()
    before, after = normal(HEADS, HEADS), normal(HEADS, HEADS, seed=1)
    scores = torch.einsum("bhij,hg->bgij", 0.6 * q @ k.mT, before.T).masked_fill(LATER, -torch.inf)
    weights = torch.einsum("bhij,hg->bgij", scores.softmax(-1), after.T)
    z, map = run((MixHeads(before[None]),), (MixHeads(after[None]),))
    near(map, weights)
    near(z, weights @ v)


def test_dynamic_composition_is_a_matrix_for_each_pair():
    """Xiao et al. 2024: A' = A W_b + (A w_q1) w_q2 + A ∘ w_qg + (A w_k1) w_k2 + A ∘ w_kg, on scores and on weights."""
    q, k, _ = operands()
    rank, base = 2, normal(HEADS, HEADS)
    q1, k1 = normal(2, N, HEADS, rank), normal(2, N, HEADS, rank, seed=1)
    q2, k2 = normal(2, N, rank, HEADS, seed=2), normal(2, N, rank, HEADS, seed=3)
    q_gate, k_gate = normal(2, N, HEADS, seed=4), normal(2, N, HEADS, seed=5)

    def composed(a):
        by_query = torch.einsum("bhij,bihr,birg->bgij", a, q1, q2) + a * q_gate.mT[..., None]
        by_key = torch.einsum("bhij,bjhr,bjrg->bgij", a, k1, k2) + a * k_gate.mT[:, :, None]
        return torch.einsum("bhij,hg->bgij", a, base) + by_query + by_key

    expected = composed(composed(0.6 * q @ k.mT).masked_fill(LATER, -torch.inf).softmax(-1))
    # M is indexed by the new head, then the old
    of_query, of_key = ((a @ b).mT + torch.diag_embed(g) for a, b, g in ((q1, q2, q_gate), (k1, k2, k_gate)))
    edit = MixHeads(base.T[None], of_query, of_key)
    near(run((edit,), (edit,))[1], expected, 1e-10)


def test_key_query_convolution_is_that_of_multi_token_attention():
    """Golovneva et al. 2025: softmax(mask(Conv2d(mask_0(s)))), over earlier queries and keys on both sides."""
    q, k, _ = operands()
    kernel = normal(HEADS, 3, 5)
    shown = (0.6 * q @ k.mT).masked_fill(LATER, 0.0)
    padded = torch.nn.functional.pad(shown, (2, 2, 2, 0))
    # the layer slides its weights over the scores: weight [u, w] meets query i - 2 + u and key j - 2 + w
    expected = torch.nn.functional.conv2d(padded, kernel[:, None], groups=HEADS).masked_fill(
        LATER, -torch.inf
    )
    edit = ConvolveScores(kernel.flip(-2, -1)[None], ahead=2)
    near(run((edit,))[1], expected.softmax(-1))


CASES = {
    "mix": ((MixHeads(normal(1, HEADS, HEADS)),), (MixHeads(normal(1, HEADS, HEADS, seed=1)),)),
    "by query and key": (
        (MixHeads(normal(2, HEADS, HEADS), normal(1, N, HEADS, HEADS), normal(2, N, HEADS, HEADS)),),
        (MixHeads(normal(1, HEADS, HEADS), None, normal(1, N, HEADS, HEADS)),),
    ),
    "convolution": ((ConvolveScores(normal(1, HEADS, 2, 4), 1), ScaleScores(EVERY, 0.5)), ()),
    "all": (
        (ScaleScores(EVERY, 0.7), ConvolveScores(normal(2, HEADS, 2, 3), 1), MixHeads(normal(1, HEADS, HEADS))),
        (MixIdentity(EVERY, 0.2), MixHeads(normal(1, HEADS, HEADS)), Rescale(EVERY, ALL & False, ALL, 0.5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [1, 2**19])
def test_pairs_products_and_statistics_are_those_of_the_dense_map(name, elements):
    scores, weights = CASES[name]
    q, k, v = operands()
    rule = ScoreRule(0.6, CAUSAL, edits=scores)
    with block_elements(elements):
        _, map = attend(q, k, v, rule, weights)
        expected = reference.attend(q, k, v, rule, weights)
        columns = torch.randint(0, N, (2, HEADS, N, 3), generator=torch.Generator().manual_seed(0))
        near(map.at(columns), expected.weights.gather(-1, columns), 1e-6, "at")
        near(
            map.at(columns[0, 0]), expected.weights.gather(-1, columns[:1, :1].expand(2, HEADS, -1, -1)), 1e-6
        )
        near(map @ v, expected.weights @ v, 1e-9)
        near(map.T @ q, expected.weights.mT @ q, 1e-9)
        near(map.tile(slice(2, 5), slice(1, 4), heads=[2, 0]), expected.weights[:, [2, 0], 2:5, 1:4], 1e-6)
        assert map.signed == bool(weights)
        names = ("row_mass", "max", "received", "distance") if weights else ("entropy", "max", "received")
        wanted = reference.statistics(expected, rule)
        for statistic, values in map.statistics(names).items():
            near(values, wanted[statistic], 1e-5, statistic)


def test_a_head_that_sees_nothing_in_a_row_has_no_weights_and_gives_none():
    blind = BlockScores(torch.tensor([True, False, False]), torch.arange(N)[None] == 4, ALL)
    mix = MixHeads(normal(1, HEADS, HEADS))
    _, map = run((blind,), (mix, mix))
    once = torch.einsum("gh,bhij->bgij", mix.mix[0], run((blind,))[1])
    once[:, 0, 4] = 0
    twice = torch.einsum("gh,bhij->bgij", mix.mix[0], once)
    twice[:, 0, 4] = 0
    near(map, twice)


def test_matrices_and_kernels_carry_gradients():
    q, k, v = operands()
    leaves = [normal(1, HEADS, HEADS), normal(1, HEADS, 2, 3), normal(1, HEADS, HEADS, seed=1)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    rule = ScoreRule(0.6, CAUSAL, edits=(MixHeads(leaves[0]), ConvolveScores(leaves[1], 1)))
    edits = (MixHeads(leaves[2]),)
    seed = normal(*v.shape, seed=2)
    with block_elements(1):
        z, map = attend(q, k, v, rule, edits)
    found = torch.autograd.grad((z * seed).sum(), leaves)
    expected = torch.autograd.grad((reference.attend(q, k, v, rule, edits).z * seed).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        near(one, other, 1e-9)
    assert not dense(map).requires_grad


def test_fused_backends_refuse_them_by_name_and_a_cache_has_lost_queries():
    q, k, v = (x.float() for x in operands())
    mix, convolution = MixHeads(torch.eye(HEADS)[None]), ConvolveScores(torch.ones(1, HEADS, 2, 1), 0)
    for edit in (mix, convolution):
        rule = ScoreRule(0.6, CAUSAL, edits=(edit,))
        assert choose(q, k, rule).backend.name == "blocked"
        with pytest.raises(ValueError, match=f"flash can not compute the score edit {type(edit).__name__}"):
            choose(q, k, rule, backend="flash")
    with pytest.raises(ValueError, match="flash can not compute the weight edit MixHeads"):
        choose(q, k, ScoreRule(0.6, CAUSAL), (mix,), backend="flash")
    late = Mask(2, N, right=0, query_offset=N - 2)
    with pytest.raises(ValueError, match="needs the queries that a cache has not kept"):
        attend(q[:, :, -2:], k, v, ScoreRule(0.6, late, edits=(convolution,)))
