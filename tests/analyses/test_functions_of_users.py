"""Functions, answers and models of a wrong kind are refused in one line, before or in the place of a number."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, ModelError, PromptError

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 4, 3]])


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def first(outputs):
    return outputs[:, -1, 0]


def test_a_function_is_called_with_what_it_takes(model):
    for wrong in (3, "first", lambda: 1, lambda a, b, c: a):
        with pytest.raises(AnalysisError, match=r"^measure .*; give a function measure\(outputs\)"):
            analyses.input_gradient(model, IDS, measure=wrong)
        with pytest.raises(AnalysisError, match=r"^loss .*; give a function loss\(outputs, tokens\)"):
            analyses.head_importance(model, IDS, loss=wrong)
    for right in (first, lambda outputs, more=0: first(outputs), lambda *all: first(all[0])):
        given = analyses.input_gradient(model, IDS, measure=right)
        assert given.equals(analyses.input_gradient(model, IDS, measure=first))


def test_a_function_that_cuts_the_gradient_is_refused(model):
    for explain in (analyses.input_gradient, analyses.integrated_gradients, analyses.relevance):
        with pytest.raises(
            AnalysisError, match="the measure has no gradient; compute it from what it is given"
        ):
            explain(model, IDS, measure=lambda outputs: first(outputs).detach())

    def loss(outputs, tokens):
        return first(outputs).detach()

    for train in (analyses.head_importance, analyses.learn_gates):
        with pytest.raises(AnalysisError, match="the loss has no gradient"):
            train(model, IDS, loss=loss)
    cut = analyses.blank_out(model, IDS, measure=lambda outputs: first(outputs).detach(), blank="#9")
    assert cut.equals(analyses.blank_out(model, IDS, measure=first, blank="#9"))  # which needs no gradient


def test_answers_are_one_or_one_per_text(model):
    for what in ("answer", "wrong"):
        asked = {"answer": 7, what: [5, 6, 7]}
        with pytest.raises(
            AnalysisError, match=f"{what} holds 3 tokens for 2 texts; give one, or one per text"
        ):
            analyses.input_gradient(model, IDS, **asked)
    both = analyses.input_gradient(model, IDS, answer=[5, 6])
    for n, token in enumerate((5, torch.tensor(6))):
        alone = analyses.input_gradient(model, IDS[n : n + 1], answer=token)
        torch.testing.assert_close(torch.tensor(both.values[n]), torch.tensor(alone.values[0]))
    tokenless = hw.load("tasks-4l")
    with pytest.raises(PromptError, match="answer='#²' is not one token"):
        analyses.input_gradient(tokenless, "Mary", answer="#²")


def test_an_encoder_that_lends_its_table_is_explained():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        num_labels=3,
        decoder_start_token_id=0,
    )
    hf = transformers.T5ForTokenClassification(config).eval()
    model = hw.load(hf)
    embedded = hf.transformer.encoder.embed_tokens(IDS).detach().requires_grad_()
    (slope,) = torch.autograd.grad(hf(inputs_embeds=embedded).logits[:, 2, 1].sum(), embedded)
    found = analyses.input_x_gradient(model, IDS, answer=1, position=2, kind="logit")
    torch.testing.assert_close(
        torch.tensor(found.values).float(), (slope * embedded).sum(-1).detach(), atol=1e-5, rtol=1e-4
    )
    with model.edit(hw.Knockout(queries="all", keys="token:#6")):
        edited = model(IDS)
    torch.testing.assert_close(edited[1], model(IDS)[1])
    assert (edited[0] - model(IDS)[0]).abs().max() > 1e-6


def test_the_language_head_of_pretraining_is_one():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = hw.load(transformers.BertForPreTraining(config).eval())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), model.hf(input_ids=IDS).prediction_logits)
    assert analyses.input_gradient(model, IDS, answer=5).shape == (2, 4)
    assert analyses.patch(model, IDS, IDS.flip(1)).notnull().all()


def test_calls_of_a_wrong_kind(model):
    for call, error, words in (
        (lambda: model.record(IDS, attention_mask="x"), PromptError, "attention_mask is a tensor of 0 and 1; got 'x'"),
        (lambda: model.record(IDS, attention_mask=IDS * 0.1), PromptError, "holds 1 for a token and 0 for padding"),
        (lambda: model.record(IDS, layers=[]), Exception, "no layer is chosen; use layers='all'"),
        (lambda: model.record(IDS, layers=None), Exception, "layers are 'all', a number or a list of numbers"),
        (lambda: model.record(IDS, keep=None), Exception, "keep=None can not be read; give 'qk'"),
        (lambda: model.record(IDS, statistics=3), Exception, "statistics=3 can not be read"),
        (lambda: model.record(IDS, groups=3), Exception, "groups=3 can not be read"),
        (lambda: model.record(IDS).statistic(3), Exception, "unknown statistic 3: there are"),
        (lambda: model.generate(IDS, 1, temprature=1.0), PromptError, "did you mean 'temperature'"),
        (lambda: model.generate(IDS, True), PromptError, "max_new_tokens is a whole number"),
        (lambda: model.generate(IDS, 1, on_token=3), PromptError, "on_token is a function"),
        (lambda: model.to_strings("w5"), PromptError, "to_strings takes token ids"),
        (lambda: model.token_groups("w5"), PromptError, r"token_groups takes what model.to_tokens\(prompt\) returns"),
        (lambda: hw.remove_heads(None, "0.0"), ModelError, "takes an open model, as hw.load gives it; got NoneType"),
        (lambda: hw.load(model.hf, tokenizer="x"), ModelError, "tokenizer is a tokenizer of transformers; got 'x'"),
    ):  # fmt: skip
        with pytest.raises(hw.HeadwaterError, match=words) as caught:
            call()
        assert isinstance(caught.value, error)
