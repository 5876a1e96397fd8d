"""The embedded model: analyses on its own prompts against an eager float64 twin."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater.analyses._prompts.examples import repeated_tokens
from headwater.analyses.heads.head_importance import head_importance
from headwater.analyses.heads.head_roles import head_roles
from headwater.analyses.sinks.sink_rate import sink_rate
from headwater.analyses.tokens.attention_distance import attention_distance
from headwater.analyses.tokens.rollout import rollout
from headwater.lens.models.embedded import embedded
from headwater.lens.prompts import prompt_set

NAME = "tasks-4l"


@cache
def model() -> hw.HookedModel:
    return hw.load(NAME)


@cache
def twin() -> torch.nn.Module:
    folder = embedded()[NAME]["path"]
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return plain.double().eval()


def maps(ids: torch.Tensor) -> np.ndarray:
    """[layer, head, query, key] of one text."""
    with torch.no_grad():
        found = twin()(ids[None], output_attentions=True).attentions
    return torch.stack(found)[:, 0].double().numpy()


def test_prompts_of_two_lengths_in_one_batch() -> None:
    texts = [prompt_set("capital", 1)[0].prompt, prompt_set("indirect_object", 1)[0].prompt]
    tokens = model().to_tokens(texts)
    record = model().record(tokens)
    shares, rolled, far = [], [], []
    for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
        dense = maps(ids[mask])
        n = dense.shape[-1]
        shares.append(dense[..., 0].mean(-1))
        product = np.eye(n)
        for layer in dense.mean(1):
            product = (0.5 * layer + 0.5 * np.eye(n)) @ product
        rolled.append(product[-1])
        far.append((dense * np.abs(np.subtract.outer(np.arange(n), np.arange(n)))).sum(-1).mean(-1))
    np.testing.assert_allclose(sink_rate(record).received_share_per_example, shares, atol=5e-6)
    np.testing.assert_allclose(sink_rate(record).sink_rate, (np.array(shares) > 0.3).mean())
    np.testing.assert_allclose(attention_distance(record, per_example=True), far, atol=5e-5)
    for found, expected in zip(rollout(record).values[:, 0], rolled, strict=True):
        np.testing.assert_allclose(found[: len(expected)], expected, atol=5e-6)
        np.testing.assert_allclose(found[len(expected) :], 0)


def test_roles_against_dense_maps() -> None:
    ids = repeated_tokens(model(), 20, 3, 7, model().tokenizer.bos_token_id)
    dense = np.stack([maps(row) for row in ids])
    rows = np.arange(21, 41)
    found = head_roles(model(), length=20, sequences=3, seed=7)
    for role, back in (("previous", 1), ("duplicate", 20), ("induction", 19)):
        expected = dense[..., rows, rows - back].mean((0, -1))
        np.testing.assert_allclose(found.sel(role=role), expected, atol=5e-6, err_msg=role)


def test_importance_is_what_the_edits_do() -> None:
    """The slope is that between a head at 99 % and at 101 %, the effect of removal that of ablating it."""
    texts = [example.prompt + " " + example.answer for example in prompt_set("indirect_object", 6, seed=3)]
    slope = head_importance(model(), texts)
    removal = head_importance(model(), texts, how="ablation")

    def losses(edit: hw.ScaleHeads | hw.AblateHeads) -> torch.Tensor:
        with model().edit(edit):
            return model().loss(texts).double()

    base = model().loss(texts).double()
    for head in ("0.0", "1.5", "3.7"):
        layer, index = hw.Head.parse(head)
        rise = (losses(hw.ScaleHeads({head: 1.01})) - losses(hw.ScaleHeads({head: 0.99}))) / 0.02
        assert float(slope[layer, index]) == pytest.approx(float(rise.abs().mean()), rel=0.05, abs=5e-4)
        effect = float((losses(hw.AblateHeads(head)) - base).mean())
        assert float(removal[layer, index]) == pytest.approx(effect, abs=1e-5)
