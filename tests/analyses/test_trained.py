"""The embedded model: analyses on its own prompts against an eager float64 twin."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater.analyses.attention_distance import attention_distance
from headwater.analyses.head_importance import head_importance
from headwater.analyses.head_roles import head_roles, repeated_tokens
from headwater.analyses.rollout import rollout
from headwater.analyses.sink_rate import sink_rate
from headwater.lens.models import embedded
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


@pytest.mark.parametrize("how", ["gradient", "ablation"])
def test_importance_predicts_what_removal_does(how: str) -> None:
    """Taking out the four heads named most important costs more than the four named least."""
    texts = [example.prompt + " " + example.answer for example in prompt_set("indirect_object", 12, seed=3)]
    order = head_importance(model(), texts, how=how).stack(at=("layer", "head")).to_series().sort_values()
    names = [f"{layer}.{head}" for layer, head in order.index]
    losses = []
    for heads in (names[:4], names[-4:]):
        with model().edit(hw.AblateHeads(heads)):
            losses.append(float(model().loss(texts).mean()))
    assert losses[1] > losses[0] + 0.1
