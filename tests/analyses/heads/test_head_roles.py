"""Head roles on heads built to do one job, against eager float64 maps, and copying against full
eigenvalues."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf
from limits import lower

import headwater as hw
from headwater.analyses._prompts.examples import repeated_tokens
from headwater.analyses.heads.head_roles import ROLES, head_roles
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


def by_loop(maps: np.ndarray, ids: np.ndarray, m: int) -> dict[str, np.ndarray]:
    """The five scores of maps [layer, batch, head, query, key], position by position."""
    total = ids.shape[1]
    found = {name: np.zeros((*maps.shape[:3],)) for name in ROLES[:5]}
    for b in range(len(ids)):
        for i in range(total - m, total):
            row = maps[:, b, :, i]
            found["previous"][:, b] += row[..., i - 1] / m
            found["duplicate"][:, b] += row[..., i - m] / m
            found["induction"][:, b] += row[..., i - (m - 1)] / m
            found["first"][:, b] += row[..., 0] / m
            for j in range(1, i):
                if ids[b, j - 1] == ids[b, i]:
                    found["prefix_matching"][:, b] += row[..., j] / m
    return {name: scores.mean(1) for name, scores in found.items()}


@pytest.mark.parametrize("length", [7, 20])
def test_scores_match_dense_maps(causal_pair, length: int) -> None:
    """61 words, so 20 of them repeat by chance and prefix matching differs from induction."""
    found = head_roles(causal_pair.model, length=length, sequences=5, seed=3)
    assert found.dims == ("layer", "head", "role")
    ids = repeated_tokens(causal_pair.model, length, 5, 3, 1)
    assert ids.shape == (5, 2 * length + 1)
    assert (ids[:, 0] == 1).all()
    assert torch.equal(ids[:, 1 : length + 1], ids[:, length + 1 :])
    expected = by_loop(causal_pair.maps(ids).numpy(), ids.numpy(), length)
    for name, scores in expected.items():
        np.testing.assert_allclose(found.sel(role=name), scores, atol=2e-6, err_msg=name)


def plain_gains(twin: torch.nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gains of the norms before attention and of the last one, by the architecture's own names."""
    if isinstance(twin, hf.GPT2LMHeadModel):
        return [block.ln_1.weight for block in twin.transformer.h], twin.transformer.ln_f.weight
    plus = 1 if isinstance(twin, hf.Gemma2ForCausalLM) else 0
    return [plus + layer.input_layernorm.weight for layer in twin.model.layers], plus + twin.model.norm.weight


def value_output(twin: torch.nn.Module, layer: int, head: int) -> torch.Tensor:
    """W_V W_O of one query head [d_model, d_model] by slicing the stored matrices."""
    if isinstance(twin, hf.GPT2LMHeadModel):
        attention = twin.transformer.h[layer].attn
        value = attention.c_attn.weight[:, 64 + 8 * head : 64 + 8 * (head + 1)]
        return value @ attention.c_proj.weight[8 * head : 8 * (head + 1)]
    block = twin.model.layers[layer]
    group = head // 2
    value = block.self_attn.v_proj.weight[8 * group : 8 * (group + 1)].T
    output = block.self_attn.o_proj.weight[:, 8 * head : 8 * (head + 1)].T
    if isinstance(twin, hf.Gemma2ForCausalLM):
        output = output * (1 + block.post_attention_layernorm.weight)
    return value @ output


def test_copying_is_the_eigenvalue_share_of_the_whole_matrix(causal_pair) -> None:
    """Eigenvalues of the vocab × vocab matrix itself, with norm gains that are not 1.

    LayerNorm takes the mean out of what it reads, so the circuit of GPT-2 has none at either end.
    """
    twin = copy.deepcopy(causal_pair.twin)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in twin.named_parameters():
        if any(word in name for word in ("norm", "ln_")):
            parameter.data += 0.5 * torch.rand(parameter.shape, generator=generator)
    model = hw.load(copy.deepcopy(twin).float())
    found = head_roles(model, length=4, sequences=1).sel(role="copying")
    gains, last = plain_gains(twin)
    embed, unembed = twin.get_input_embeddings().weight, last[:, None] * twin.get_output_embeddings().weight.T
    with torch.no_grad():
        if isinstance(twin, hf.GPT2LMHeadModel):
            embed, unembed = embed - embed.mean(-1, keepdim=True), unembed - unembed.mean(0)
        for layer, head in np.ndindex(3, 4):
            circuit = (embed * gains[layer]) @ value_output(twin, layer, head) @ unembed
            values = torch.linalg.eigvals(circuit)
            expected = float(values.real.sum() / values.abs().sum())
            assert float(found[layer, head]) == pytest.approx(expected, abs=2e-4)


def jobs_model() -> hf.GPT2LMHeadModel:
    """One layer, heads hand-set: previous token, duplicate, first token, uniform.

    The stream holds a one-hot token and, by a rotation per position, a position code; a large score makes
    each head exact. Token ids 0-30; the bos is 0.
    """
    tokens, places = 31, 33
    width, d_head = 128, 32
    config = hf.GPT2Config(
        n_embd=width,
        n_layer=1,
        n_head=4,
        n_positions=places,
        vocab_size=tokens,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = hf.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    block = model.transformer.h[0]
    block.ln_1.weight.data.fill_(1)
    model.transformer.ln_f.weight.data.fill_(1)
    # one-hot tokens in the first half, circular position code (16 frequencies) in the second
    model.transformer.wte.weight.data[:, :tokens] = 10 * torch.eye(tokens)
    angle = 2 * torch.pi * torch.arange(1, 17)[None] * torch.arange(places)[:, None] / places
    code = torch.stack([angle.cos(), angle.sin()], -1).flatten(1)
    model.transformer.wpe.weight.data[:, 64:96] = 3 * code
    weight = block.attn.c_attn.weight.data
    turn = torch.zeros(d_head, d_head)
    for f in range(16):
        step = torch.tensor(2 * torch.pi * (f + 1) / places)
        turn[2 * f : 2 * f + 2, 2 * f : 2 * f + 2] = torch.tensor(
            [[step.cos(), -step.sin()], [step.sin(), step.cos()]]
        )
    sharp = 8.0
    weight[64:96, 0:32] = sharp * turn  # head 0: the query turned back by one position
    weight[64:96, width : width + 32] = sharp * torch.eye(32)
    weight[:31, 32:63] = sharp * torch.eye(31)  # head 1: the same token
    weight[:31, width + 32 : width + 63] = sharp * torch.eye(31)
    weight[0, width + 64] = sharp * 20  # head 2: the bos token, whatever the query
    block.attn.c_attn.bias.data[64] = sharp
    # head 1 copies: the token goes through value and output unchanged; head 3 writes its negative
    weight[:31, 2 * width + 32 : 2 * width + 63] = torch.eye(31)
    block.attn.c_proj.weight.data[32:63, :31] = torch.eye(31)
    weight[:31, 2 * width + 96 : 2 * width + 127] = torch.eye(31)
    block.attn.c_proj.weight.data[96:127, :31] = -torch.eye(31)
    return model


def test_a_token_that_is_read_and_never_written_changes_nothing() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, vocab_size=61, max_position_embeddings=64)).eval()
    more = copy.deepcopy(plain)
    more.model.embed_tokens = torch.nn.Embedding(62, 32)  # a start token, as Moshi has
    with torch.no_grad():
        more.model.embed_tokens.weight[:61] = plain.model.embed_tokens.weight
    found, wanted = (head_roles(hw.load(model), length=5).sel(role="copying") for model in (more, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_heads_built_for_one_job() -> None:
    found = head_roles(hw.load(jobs_model()), length=12, sequences=6)[0]
    assert float(found.sel(head=0, role="previous")) > 0.99
    assert float(found.sel(head=2, role="first")) > 0.99
    # a duplicate head looks at its own position too, and at chance repeats within the copy
    assert 0.3 < float(found.sel(head=1, role="duplicate")) <= 0.5
    np.testing.assert_allclose(found.sel(role="copying")[[1, 3]], [1, -1], atol=1e-5)
    assert float(found.sel(head=3, role="previous")) == pytest.approx(
        np.mean([1 / (i + 1) for i in range(13, 25)]), abs=1e-4
    )
    assert np.isnan(
        found.sel(head=0, role="copying")
    )  # an OV circuit of zeros copies nothing and its opposite


def test_uniform_attention(uniform: hw.HookedModel) -> None:
    found = head_roles(uniform, length=10, sequences=3)
    expected = np.mean([1 / (i + 1) for i in range(11, 21)])
    for role in ("previous", "duplicate", "induction", "first"):
        np.testing.assert_allclose(found.sel(role=role), expected, atol=1e-6)


def test_shapes_match_dense_maps(causal_pair) -> None:
    """Positional, broad and narrow row by row, a batch of four and one sequence that has no other."""
    model = causal_pair.model
    found = head_roles(model, length=8, sequences=5, seed=3, per_example=True)
    ids = repeated_tokens(model, 8, 5, 3, 1)
    maps = causal_pair.maps(ids).numpy()[..., 9:, :]
    seen = (maps > 0).any((1, 2)).sum(-1)  # [layer, query]
    for b, layer, head in ((0, 0, 1), (3, 2, 2), (2, 1, 3)):
        own, other = maps[layer, b, head], maps[layer, (b + 1) % 4, head]
        alike = np.mean([2 * np.minimum(x, y).sum() / (x + y).sum() for x, y in zip(own, other, strict=True)])
        rows = own / own.sum(-1, keepdims=True)
        entropy = -np.where(rows > 0, rows * np.log(np.where(rows > 0, rows, 1)), 0).sum(-1)
        at = found.sel(batch=b, layer=layer, head=head)
        assert float(at.sel(role="positional")) == pytest.approx(alike, abs=3e-6)
        assert float(at.sel(role="narrow")) == pytest.approx(rows.max(-1).mean(), abs=3e-6)
        expected = np.mean(entropy / np.log(seen[layer]))
        assert float(at.sel(role="broad")) == pytest.approx(expected, abs=3e-6)
    assert np.isnan(found.sel(batch=4, role="positional")).all()


def test_shapes_of_heads_built_for_one_job() -> None:
    """Previous token and first token: positions alone, one key. Uniform: every key. Duplicate: by content."""
    found = head_roles(hw.load(jobs_model()), length=12, sequences=4)[0]
    np.testing.assert_allclose(found.sel(role="positional")[[0, 2, 3]], 1, atol=1e-2)
    assert float(found.sel(role="positional", head=1)) < 0.95
    np.testing.assert_allclose(found.sel(role="narrow")[[0, 2]], 1, atol=1e-2)
    assert float(found.sel(role="broad", head=3)) == pytest.approx(1, abs=1e-5)
    assert np.isnan(found.sel(role="delimiter")).all()  # no tokenizer


def test_delimiters(pairs: Callable, monkeypatch) -> None:
    """w5 and w9 taken for delimiters: the weight on them, by dense maps of the very sequences."""
    pair = pairs("llama")
    model = pair.model
    lower(monkeypatch, "analyses.heads.head_roles", DELIMITERS=["w5", "w9", "no word"])
    found = head_roles(model, length=10, sequences=2, seed=1).sel(role="delimiter")
    recorded = []
    whole = type(model).record
    monkeypatch.setattr(
        type(model), "record", lambda s, ids, **more: recorded.append(ids) or whole(s, ids, **more)
    )
    head_roles(model, length=10, sequences=2, seed=1)
    ids = recorded[-1]
    assert torch.isin(ids[:, [6, 12, 18]], torch.tensor([5, 9])).all()
    signs = torch.isin(ids, torch.tensor([5, 9])).numpy()
    maps = pair.maps(ids).numpy()[..., 12:, :]
    expected = np.einsum("lbhqk,bk->lbhq", maps, signs).mean((1, 3))
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_seed_and_sequences(pairs: Callable) -> None:
    model = pairs("llama").model
    one, again, other = (head_roles(model, length=5, sequences=6, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    rows = head_roles(model, length=5, sequences=6, seed=1, per_example=True)
    assert rows.dims == ("batch", "layer", "head", "role")
    assert rows.sizes["batch"] == 6
    np.testing.assert_allclose(rows.mean("batch"), one, atol=1e-12)


def test_a_short_context_shortens_the_repeats(pairs: Callable) -> None:
    found = head_roles(pairs("gpt2").model)
    assert found.attrs["length"] == 31  # 64 positions hold a bos and twice 31
    with pytest.raises(AnalysisError, match="2 to 31 tokens"):
        head_roles(pairs("gpt2").model, length=32)
    with pytest.raises(AnalysisError, match="sequences=0"):
        head_roles(pairs("gpt2").model, sequences=0)


def test_models_it_is_not_for(pairs: Callable, minilm) -> None:
    for model in (pairs("bert").model, minilm.model):
        with pytest.raises(AnalysisError, match="not causal"):
            head_roles(model)
    bare = hw.load(hf.GPT2Model(pairs("gpt2").model.hf.config).eval())
    found = head_roles(bare, length=4, sequences=1)
    assert np.isnan(found.sel(role="copying")).all()
    assert "language head" in found.attrs["copying"]
    assert not np.isnan(found.sel(role="induction")).any()


def test_a_decoder_behind_an_encoder_is_refused() -> None:
    with pytest.raises(AnalysisError, match="its decoder reads no text of its own"):
        head_roles(hw.load(zoo.build("t5")), length=6)


def test_roles_with_the_sink_set_aside(pairs: Callable) -> None:
    """Dense rows without the sink's column, divided by what is left; heads look at the first token by a planted key."""
    twin = copy.deepcopy(pairs("gpt2").twin)
    with torch.no_grad():
        for block in twin.transformer.h:  # two of four heads are drawn to where dimension 0 is large
            block.attn.c_attn.bias[:16] += 3
            block.attn.c_attn.weight[0, 32:48] += 0.4
        twin.transformer.wpe.weight[:, 0] = -1
        twin.transformer.wpe.weight[0, 0] = 6
    model = hw.load(copy.deepcopy(twin).float(), tokenizer=pairs("gpt2").model.tokenizer)
    m = 6
    plain = head_roles(model, length=m, sequences=3, seed=1)
    found = head_roles(model, length=m, sequences=3, seed=1, sinks="aside")
    ids = repeated_tokens(model, m, 3, 1, 1)
    with torch.no_grad():
        maps = np.stack([a.numpy() for a in twin(ids, output_attentions=True).attentions])
    share = maps[..., 0].mean(3)  # every query sees the first token: [layer, batch, head]
    assert ((share > 0.3).mean((0, 2)) > 0.1).all()
    rows = maps[:, :, :, -m:]
    np.testing.assert_allclose(found.aside, rows[..., 0].mean((1, 3)), atol=1e-5)
    left = maps.copy()
    left[..., 0] = 0
    left /= left.sum(-1, keepdims=True).clip(1e-30)
    expected = by_loop(left, ids.numpy(), m)
    for name in ("previous", "duplicate", "induction", "prefix_matching"):
        np.testing.assert_allclose(found.sel(role=name), expected[name], atol=2e-5, err_msg=name)
    assert found.sel(role="first").isnull().all()
    rows, other = left[:, :, :, -m:], np.roll(left, -1, 1)[:, :, :, -m:]
    alike = 2 * np.minimum(rows, other).sum(-1) / (rows + other).sum(-1)
    np.testing.assert_allclose(found.sel(role="positional"), alike.mean((1, 3)), atol=1e-5)
    seen = np.arange(m + 1, 2 * m + 1)  # without the sink
    entropy = -(rows * np.log(rows.clip(1e-30))).sum(-1) / np.log(seen)
    np.testing.assert_allclose(found.sel(role="broad"), entropy.mean((1, 3)), atol=1e-5)
    np.testing.assert_allclose(found.sel(role="narrow"), rows.max(-1).mean((1, 3)), atol=1e-5)
    assert (found.sel(role="positional") < plain.sel(role="positional"))[:, :2].all()
    np.testing.assert_array_equal(found.sel(role="copying"), plain.sel(role="copying"))


def test_without_a_sink_nothing_is_set_aside(uniform: hw.HookedModel) -> None:
    settings = {"length": 9, "sequences": 2}
    found = head_roles(uniform, sinks="aside", per_example=True, **settings)
    assert found.aside.dims == ("batch", "layer", "head")
    assert (found.aside == 0).all()
    np.testing.assert_array_equal(found, head_roles(uniform, per_example=True, **settings))
