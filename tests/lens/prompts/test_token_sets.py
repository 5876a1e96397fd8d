"""Measures over sets of tokens, in closed form and as measures of patching.

Mutations seen to fail: a year equal to the start counted as larger, all pairs measured by the first one's sets.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from trained_tokenizers import made

import headwater as hw
from headwater import analyses
from headwater.lens.errors import PromptError
from headwater.lens.prompts.prompt_sets import prompt_set, year_tokens
from headwater.lens.prompts.token_sets import sets_measure, years_measure


def test_measures_of_sets_in_closed_form() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits[:, -1].exp() / logits[:, -1].exp().sum(-1, keepdim=True)
    found = sets_measure([[1, 2], [3]], [[0], [4, 5]])(logits)
    expected = torch.stack([p[0, 1] + p[0, 2] - p[0, 0], p[1, 3] - p[1, 4] - p[1, 5]])
    torch.testing.assert_close(found, expected)
    row = logits[:, 0]
    shared = sets_measure([[1, 2]], [[0]], kind="logit", position=0)(logits)
    torch.testing.assert_close(shared, (row[:, 1] + row[:, 2]) / 2 - row[:, 0])
    for bad, message in (
        (([[1]], []), "1 right and 0 wrong"), (([[]], [[1]]), "set 0 holds no token"),
    ):  # fmt: skip
        with pytest.raises(PromptError, match=message):
            sets_measure(*bad)
    with pytest.raises(PromptError, match="kind='nats'"):
        sets_measure([[1]], [[2]], "nats")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"sets for 3 pairs and got 2; .* batch_size=3"):
        sets_measure([[1]] * 3, [[2]] * 3)(logits)
    with pytest.raises(PromptError, match="greater_than"):
        years_measure(prompt_set("capital", 2), None)


def test_a_measure_of_years_is_patched_and_attributed() -> None:
    """On a random model: the measure reaches every analysis of pairs, and patching everything moves it all the way."""
    tokenizer = made("bpe")
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = hw.load(hf.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    drawn = prompt_set("greater_than", 4, model=model)
    measure = years_measure(drawn, tokenizer)
    value = measure(model([e.prompt for e in drawn]))
    for n, example in enumerate(drawn):
        right, wrong = year_tokens(tokenizer, example)
        p = model([example.prompt])[0, -1].double().softmax(-1)
        assert float(value[n]) == pytest.approx(float(p[right].sum() - p[wrong].sum()), abs=1e-6)
    clean, corrupt = [e.prompt for e in drawn], [e.corrupt for e in drawn]
    found = analyses.patch(model, clean, corrupt, measure, what="residual", layers=[0])
    assert found.sizes["batch"] == 4
    torch.testing.assert_close(torch.tensor(found.clean.values), value.double(), atol=1e-6, rtol=1e-4)
    graph = analyses.edge_attribution(model, drawn, measure=measure, steps=1)
    assert any(score for *_, score in graph.edges(data="score"))
