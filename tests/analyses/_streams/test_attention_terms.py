"""Blocks of further architectures taken apart, and models that can not be.

Mutations seen to fail: a norm of a parallel block taken for one behind the attention, read-only models let through.
"""

from __future__ import annotations

from collections.abc import Callable

import gated_models
import numpy as np
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater import analyses
from headwater.analyses._prompts.examples import Batch, batches_of
from headwater.analyses._streams.attention_terms import mixings, norm_blocks
from headwater.lens.errors import AnalysisError

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


OPT = {
    "vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "init_std": 0.2, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


DISTIL = {
    "vocab_size": 61,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}


CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "distilbert": lambda: hf.DistilBertConfig(**DISTIL),
    "opt, norms before": lambda: hf.OPTConfig(**OPT),
    "opt, norms behind": lambda: hf.OPTConfig(**OPT, do_layer_norm_before=False),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SHAPE),
    "phi": lambda: hf.PhiConfig(**SHAPE),
    "olmo2": lambda: hf.Olmo2Config(**SHAPE),
}


BEHIND = ("distilbert", "opt, norms behind")


@pytest.mark.parametrize("name", CONFIGS)
def test_terms_add_up_to_what_the_model_has(name: str) -> None:
    """What biases add is the same vector at every position, or for a norm behind the sum the same before it."""
    torch.manual_seed(0)
    kind = hf.AutoModelForMaskedLM if name == "distilbert" else hf.AutoModelForCausalLM
    model = hw.load(kind.from_config(CONFIGS[name]()).eval())
    ids = torch.randint(3, 61, (2, 7))
    for mixing in mixings(model, Batch(ids, [0, 1])).values():
        assert (mixing.first is not None) == (name in BEHIND)
        norms = () if mixing.first is None else (mixing.first,)
        left = (mixing.mixed - mixing.total(True, norms)) * mixing.divisor(norms)[..., None]
        if not norms:
            np.testing.assert_allclose(left, left[:1, :1].expand_as(left), atol=1e-5)
        else:  # a centred bias over the deviation, and the norm's own bias, which is 0 in a new model
            np.testing.assert_allclose(left, left[:1, :1].expand_as(left), atol=1e-4)
    share = analyses.alti(model, ids).values
    np.testing.assert_allclose(share.sum(-1), 1, atol=1e-6)


def test_models_that_are_read_only_or_have_two_texts() -> None:
    gptj = hf.GPTJConfig(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    model = hw.load(hf.GPTJForCausalLM(gptj).eval())
    ids = torch.arange(5, 11)[None]
    for name in ("norms", "globenc", "alti", "value_zeroing", "relevance", "gradient_rollout"):
        with pytest.raises(AnalysisError, match="neither values nor head outputs"):
            getattr(analyses, name)(model, ids)
    assert analyses.blank_out(model, ids, blank="#0").shape == (1, 6)
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    twofold = hw.load(hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=61, **sizes)).eval())
    with pytest.raises(AnalysisError, match="follows the maps of the decoder alone"):
        analyses.gradient_rollout(twofold, ids)


@pytest.mark.parametrize("name", gated_models.CONFIGS)
def test_terms_of_gated_attention_add_up_and_have_their_lengths(name):
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(2))
    expected = gated_models.dense(gated_models.gated(name), name, ids, 1)
    model = hw.load(gated_models.gated(name))
    mixing = mixings(model, next(iter(batches_of(model, ids, 1))))[1]
    # y_ij of every head by the formula: (A_ij g_i v_j) W_O
    each = torch.einsum(
        "bhqk,bhqd,bhkd,hdm->bhqkm", expected["weights"], expected["gate"], expected["value"], expected["W_O"]
    )
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(
        torch.einsum("bhqd,hdm->bqm", mixing.z, mixing.output), each.sum((1, 3)), **close
    )
    rows = mixing.vectors(mixing.map.row_blocks())
    found = torch.cat([vectors for _, vectors in rows], 2).transpose(1, 2)
    behind = mixing.scale[..., None, None]
    if mixing.scale.eq(1).all():
        torch.testing.assert_close(found, each.sum(1), **close)
        lengths = hw.analyses.norms(model, ids, queries="all", stage="attention").norm
        torch.testing.assert_close(torch.as_tensor(lengths.values)[:, 1], each.sum(1).norm(dim=-1), **close)
        heads = hw.analyses.norms(model, ids, queries="all", stage="attention", per_head=True).norm
        torch.testing.assert_close(torch.as_tensor(heads.values)[:, 1], each.norm(dim=-1), **close)
    lengths = torch.cat([part for _, part in norm_blocks(mixing, residual=True, norms=())], 1)
    whole = found * behind
    place = torch.arange(7)
    whole[:, place, place] += mixing.entering
    torch.testing.assert_close(lengths, whole.norm(dim=-1), **close)
