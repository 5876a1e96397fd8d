"""Shares of heads and the fit of an MLP against float64 runs of the eager twin and plain least squares with a column
for every weight and every coordinate of the intercept; weights planted by hand are found.

Mutations seen to fail: the mean of all logits, or the biases' part in it, forgotten; the norm's mean left in; a
parallel block taken for a serial one; repeated texts kept; heads left in the residual; the fit on all texts; terms not
centred; R² against 0; drawings without an intercept of their own; collinear terms let through; answers split between
the halves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import recall_oracle
import torch
import transformers as hf
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.analyses.logits._least_squares import ScalarFit
from headwater.lens.errors import AnalysisError

COUNT = 28
IDS = torch.randint(3, 61, (COUNT, 5), generator=torch.Generator().manual_seed(1))
RIGHT = torch.randint(3, 61, (COUNT,), generator=torch.Generator().manual_seed(2))
OTHER = (RIGHT + 7) % 61
ASKED = {"answer": [f"#{n}" for n in RIGHT], "wrong": [f"#{n}" for n in OTHER]}


def plain_fit(terms: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and intercept by one least squares problem, [text · d] rows and term + d columns."""
    texts, count, width = terms.shape
    design = np.concatenate(
        [terms.transpose(0, 2, 1).reshape(-1, count), np.tile(np.eye(width), (texts, 1))], 1
    )
    found = np.linalg.lstsq(design, target.ravel(), rcond=None)[0]
    return found[:count], found[count:]


def held_to_the_oracle(found, seen: recall_oracle.Ends, named: list[tuple[int, int]], read: Tensor) -> None:
    """A fit of the layer whose MLP reads `read` [text, d], with weights for the named heads."""
    layer = int(found.attrs["layer"])
    heads = torch.stack([seen.heads[n][:, h] for n, h in named], 1)
    terms = torch.cat([heads, (read - heads.sum(1))[:, None]], 1).numpy()
    target = seen.mlp[layer].numpy()
    fitted = found.side.values == "fitted"
    assert abs(fitted.sum() - COUNT / 2) <= 1
    weight, intercept = plain_fit(terms[fitted], target[fitted])
    np.testing.assert_allclose(found.weight, weight, atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(found.intercept, intercept, atol=5e-4)
    guess = np.einsum("t,ptd->pd", weight, terms) + intercept
    for half, side in (("fitted", fitted), ("held out", ~fitted)):
        error = np.square(target - guess)[side].sum()
        whole = np.square(target - target[fitted].mean(0))[side].sum()
        np.testing.assert_allclose(found.r_squared.sel(half=half), 1 - error / whole, atol=1e-3)
    cosine = torch.cosine_similarity(torch.from_numpy(guess), torch.from_numpy(target), dim=-1)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-3)
    for measure, along in (("ic", seen.against_mean(RIGHT)), ("ic-iw", seen.against(RIGHT, OTHER))):
        parts = np.einsum("t,ptd->ptd", weight, terms)
        expected = np.einsum("ptd,pd->pt", parts, along.numpy())
        at = found.part_share.sel(measure=measure)
        np.testing.assert_allclose(at[:, :-2], expected, atol=2e-3)
        np.testing.assert_allclose(at.sel(part="intercept"), along.numpy() @ intercept, atol=2e-3)
        np.testing.assert_allclose(at.sum("part"), (target * along.numpy()).sum(-1), atol=2e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_shares_and_fit_against_a_dense_run(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    found = analyses.factual_recall(pair.model, IDS, **ASKED, layer=1, draws=100)
    seen = recall_oracle.ends(pair.twin, IDS)
    logits = []
    handle = pair.twin.get_output_embeddings().register_forward_hook(
        lambda _, __, out: logits.append(out[:, -1])
    )
    with torch.no_grad():
        pair.twin(IDS)
    handle.remove()
    own = logits[0][range(COUNT), RIGHT]
    np.testing.assert_allclose(found.total.sel(measure="ic"), own - logits[0].mean(-1), atol=1e-4)
    np.testing.assert_allclose(
        found.total.sel(measure="ic-iw"), own - logits[0][range(COUNT), OTHER], atol=1e-4
    )
    for measure, along in (("ic", seen.against_mean(RIGHT)), ("ic-iw", seen.against(RIGHT, OTHER))):
        expected = torch.einsum("lphd,pd->plh", seen.heads, along)
        np.testing.assert_allclose(found.head_share.sel(measure=measure), expected, atol=1e-4)
        np.testing.assert_allclose(found.head_mean.sel(measure=measure), expected.mean(0), atol=1e-4)
    assert (found.head_low <= found.head_mean).all()
    assert (found.head_mean <= found.head_high).all()
    behind = seen.entering[2] - seen.mlp[1]  # what stands between attention and MLP
    held_to_the_oracle(found, seen, [(n, h) for n in (0, 1) for h in range(4)], behind)
    few = analyses.factual_recall(pair.model, IDS, **ASKED, layer=1, heads="1.2, 0.3", draws=100)
    assert few.term.values.tolist() == ["1.2", "0.3", "residual"]
    held_to_the_oracle(few, seen, [(1, 2), (0, 3)], behind)


def test_in_a_parallel_block_the_mlp_reads_what_enters() -> None:
    torch.manual_seed(0)
    config = hf.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    plain = hf.GPTNeoXForCausalLM(config).eval()
    model = hw.load(copy.deepcopy(plain))
    found = analyses.factual_recall(model, IDS, **ASKED, layer=1, draws=100)
    assert found.term.values.tolist() == ["0.0", "0.1", "0.2", "0.3", "residual"]
    plain.set_attn_implementation("eager")
    seen = recall_oracle.ends(plain.double(), IDS)
    held_to_the_oracle(found, seen, [(0, h) for h in range(4)], seen.entering[1])
    for heads, named in (("layer", "1.0, 1.1, 1.2, 1.3"), (["0.1", "1.2"], "1.2")):
        with pytest.raises(
            AnalysisError, match=f"does not read {named}, since attention and MLP .* side by side"
        ):
            analyses.factual_recall(model, IDS, layer=1, heads=heads)
    with pytest.raises(AnalysisError, match="the MLP of layer 0 reads no head"):
        analyses.factual_recall(model, IDS, layer=0)


def test_biases_behind_the_stream_count_in_the_total() -> None:
    torch.manual_seed(0)
    config = hf.PhiConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    plain = hf.PhiForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    model = hw.load(plain)
    found = analyses.factual_recall(model, IDS, **ASKED, draws=100)
    logits = model(IDS)[:, -1]
    own = logits[range(COUNT), RIGHT]
    np.testing.assert_allclose(found.total.sel(measure="ic"), own - logits.mean(-1), atol=1e-4)
    np.testing.assert_allclose(found.total.sel(measure="ic-iw"), own - logits[range(COUNT), OTHER], atol=1e-4)


def linear_mlp() -> hf.GPT2LMHeadModel:
    """Head h writes coordinates 8h to 8h + 7, the embeddings none of heads 0 and 1; layer 0's MLP reads the stream
    without a norm and gives 2·o_0 - o_1 and a constant."""
    torch.manual_seed(3)
    config = hf.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
        activation_function="linear", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).eval()
    block = model.transformer.h[0]
    block.ln_2 = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        for table in (model.transformer.wte, model.transformer.wpe):
            table.weight[:, :16] = 0
        own = torch.block_diag(*[torch.ones(8, 8)] * 4)
        block.attn.c_proj.weight.mul_(own)
        block.attn.c_proj.bias.normal_()
        block.mlp.c_fc.weight.zero_()
        block.mlp.c_fc.weight[:, :32] = torch.eye(32)
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.weight[:32] = torch.diag(torch.tensor([2.0] * 8 + [-1.0] * 8 + [0.0] * 16))
        block.mlp.c_proj.bias.normal_()
    return model


def test_planted_weights_are_found() -> None:
    plain = linear_mlp()
    found = analyses.factual_recall(hw.load(copy.deepcopy(plain)), IDS, layer=0, draws=100)
    np.testing.assert_allclose(found.weight, [2, -1, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(found.weight_low, found.weight, atol=1e-4)
    np.testing.assert_allclose(found.weight_high, found.weight, atol=1e-4)
    assert found.verdict.values[:2].tolist() == ["amplified", "erased"]
    np.testing.assert_allclose(found.r_squared, 1, atol=1e-9)
    np.testing.assert_allclose(found.cosine, 1, atol=1e-9)
    assert (found.shuffled_r_squared < 0.5).all()
    block = plain.transformer.h[0]
    with torch.no_grad():
        constant = block.mlp.c_proj.bias + block.attn.c_proj.bias @ block.mlp.c_proj.weight[:32]
    np.testing.assert_allclose(found.intercept, constant, atol=1e-5)
    np.testing.assert_allclose(found.part_share.sum("part"), found.mlp_share, atol=1e-9)
    np.testing.assert_allclose(found.part_share.sel(part="error"), 0, atol=1e-5)


def test_repeats_constants_and_answers_apart(pairs: Callable) -> None:
    """A text that stands twice is read once; a silent head has no weight; answers of one half are not in the other."""
    plain = copy.deepcopy(pairs("gpt2").twin).float()
    with torch.no_grad():
        plain.transformer.h[1].attn.c_proj.weight[8:16] = 0
    model = hw.load(plain)
    once = analyses.factual_recall(model, IDS, **ASKED, layer=1, heads="layer", draws=100)
    twice = analyses.factual_recall(
        model, torch.cat([IDS, IDS[:9]]), [*ASKED["answer"], *ASKED["answer"][:9]],
        [*ASKED["wrong"], *ASKED["wrong"][:9]], layer=1, heads="layer", draws=100,
    )  # fmt: skip
    np.testing.assert_allclose(once.weight, twice.weight, rtol=1e-3, atol=1e-5)
    assert twice.batch.values.tolist() == list(range(COUNT))
    at = once.sel(term="1.1")
    assert np.isnan([float(at[name]) for name in ("weight", "weight_low", "weight_high", "inflation")]).all()
    assert str(at.verdict.values) == "open"
    np.testing.assert_allclose(once.part_share.sel(part="1.1"), 0)
    assert (once.drop_sel(term="1.1").inflation >= 1 - 1e-9).all()
    answers = [f"#{n}" for n in np.arange(COUNT) % 7 + 10]
    apart = analyses.factual_recall(model, IDS, answers, layer=1, heads="layer", apart="answer", draws=100)
    sides = [set(apart.answer.values[apart.side.values == side]) for side in ("fitted", "held out")]
    assert min(map(len, sides)) > 1
    assert not sides[0] & sides[1]
    again = analyses.factual_recall(model, IDS, answers, layer=1, heads="layer", apart="answer", draws=100)
    assert again.identical(apart)


def test_one_token_and_unequal_lengths(pairs: Callable) -> None:
    model = pairs("llama").model
    texts = ["w5", "w7 w9", *(f"w{n} w{n + 1} w{n + 2}" for n in range(5, 25))]
    found = analyses.factual_recall(model, texts, "w9", "w8", layer=0, heads="layer", draws=100)
    alone = analyses.factual_recall(model, "w5", "w9", "w8")
    np.testing.assert_allclose(found.head_share[0], alone.head_share[0], atol=1e-6)
    assert "weight" not in alone
    assert np.isnan(alone.head_low).all()
    shares = analyses.direct_logit_attribution(model, texts, "w9", "w8", unit="head")
    np.testing.assert_allclose(found.head_share.sel(measure="ic-iw"), shares, atol=1e-9)


def test_redrawn_weights_are_those_of_redrawn_texts() -> None:
    """The intervals come from products taken once per text; here every drawing is fitted anew."""
    generator = np.random.default_rng(0)
    terms, noise = generator.normal(size=(12, 3, 6)), generator.normal(size=(12, 6))
    terms[:, 2] += 0.5 * terms[:, 0]
    target = np.einsum("t,ptd->pd", [1.0, -0.5, 0.0], terms) + noise + 3
    fit = ScalarFit.of(terms, target)
    low, high = fit.bounds(terms, target, 128, seed=4)
    drawn, found = np.random.default_rng(4), []
    for _ in range(2):
        for times in drawn.multinomial(12, np.full(12, 1 / 12), size=64):
            found.append(plain_fit(np.repeat(terms, times, 0), np.repeat(target, times, 0))[0])
    np.testing.assert_allclose([low, high], np.quantile(found, [0.025, 0.975], axis=0), rtol=1e-6)
    centred = (terms - terms.mean(0)).transpose(1, 0, 2).reshape(3, -1)
    for n in range(3):
        others = np.delete(centred, n, 0).T
        rest = centred[n] - others @ np.linalg.lstsq(others, centred[n], rcond=None)[0]
        np.testing.assert_allclose(fit.inflation[n], np.square(centred[n]).sum() / np.square(rest).sum())


def test_what_is_refused(pairs: Callable) -> None:
    run = analyses.factual_recall
    with pytest.raises(AnalysisError, match="is no sum of what its parts add"):
        run(pairs("bert").model, IDS, layer=1)
    model = pairs("gpt2").model
    for given, message in (
        ({"layer": 7}, "layer=7 is not in"),
        ({"layer": 1, "heads": "2.3"}, r"the MLP of layer 1 does not read 2\.3; name heads before it"),
        ({"layer": 1, "heads": "1.9"}, r"no such head: 1\.9"),
        ({"layer": 2, "heads": "upstream"}, "13 weights can not be fitted on 13 texts; give more than 26"),
        ({"apart": "template"}, "apart='template' is unknown"),
        ({"layer": 1, "heads": "layer", "apart": "answer", "answer": "#9"}, "are of one kind"),
        ({"position": 9}, "position=9"),
    ):
        with pytest.raises(hw.HeadwaterError, match=message) as caught:
            run(model, IDS[:26], **given)
        assert "\n" not in str(caught.value)
    twin = copy.deepcopy(pairs("gpt2").twin).float()
    with torch.no_grad():  # head 1 of layer 1 does what head 0 does
        weight = twin.transformer.h[1].attn.c_attn.weight.view(32, 3, 4, 8)
        weight[:, :, 1] = weight[:, :, 0]
        bias = twin.transformer.h[1].attn.c_attn.bias.view(3, 4, 8)
        bias[:, 1] = bias[:, 0]
        twin.transformer.h[1].attn.c_proj.weight[8:16] = 2 * twin.transformer.h[1].attn.c_proj.weight[:8]
    with pytest.raises(AnalysisError, match="nearly combinations of each other"):
        run(hw.load(twin), IDS, layer=1, heads="layer")
