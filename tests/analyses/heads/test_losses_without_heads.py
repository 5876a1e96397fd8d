"""Batched, resumed ablation against one edited run per head.

Mutations seen to fail: copies laid out text by text; values of the next layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses._prompts.examples import batches_of, loss_of
from headwater.analyses.heads import _losses_without_heads
from headwater.analyses.heads._losses_without_heads import losses_without
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError, EditError
from headwater.lens.loading import zoo

GENERATOR = torch.Generator().manual_seed(3)


TEXTS = [torch.randint(3, 60, (n,), generator=GENERATOR).tolist() for n in (6, 9, 6, 9, 9)]


WRITTEN = [" ".join(f"w{token}" for token in text) for text in TEXTS]


CHOICES = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]).bool()


def last_hidden(outputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return outputs[:, -1].double().square().sum(-1)


def one_by_one(model: hw.HookedModel, value: Callable, how: Literal["zero", "mean"]) -> np.ndarray:
    """Each text by itself, heads ablated by an edit of the model."""
    found = np.zeros((len(TEXTS), model.n_layers, len(CHOICES)))
    for choice, heads in enumerate(CHOICES.tolist()):
        for layer in model.layers:
            names = [f"{layer}.{head}" for head, gone in enumerate(heads) if gone]
            for text, written in enumerate(WRITTEN):
                (batch,) = batches_of(model, [written], 1)
                with model.edit(
                    hw.AblateHeads(names, ablation=how, examples=WRITTEN if how == "mean" else None)
                ):
                    found[text, layer, choice] = float(value(batch))
    return found


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_against_one_edit_at_a_time(pair, how: Literal["zero", "mean"], monkeypatch) -> None:
    """Six architectures, texts of two lengths; few copies at a time, so that choices are split."""
    monkeypatch.setattr(_losses_without_heads, "TOKENS", 40)
    model = pair.model
    value = loss_of(model, None if pair.causal else last_hidden)
    base, after = losses_without(model, batches_of(model, WRITTEN, 2), value, CHOICES, how, 0, "test")
    np.testing.assert_allclose(after, one_by_one(model, value, how), rtol=2e-5, atol=5e-6)
    alone = [float(value(batches_of(model, [text], 1)[0])) for text in WRITTEN]
    np.testing.assert_allclose(base, alone, rtol=1e-5)


def test_runs_begin_at_the_layer(pairs: Callable) -> None:
    """The first block runs for the texts as they are, and where it is itself edited; and is left as it was."""
    model = pairs("llama").model
    ran = [0, 0, 0]
    blocks = model.hf.model.layers

    class Counting(context.Tap):
        def leaving(self, layer: int, z: torch.Tensor) -> torch.Tensor:
            ran[layer] += 1
            return z

    value = loss_of(model, None)
    batches = batches_of(model, WRITTEN[1::2], 2)
    with context.tapping(model.key, Counting()):
        losses_without(model, batches, value, CHOICES, "zero", 0, "test")
    assert ran == [2, 4, 6]  # base and own layer; and those below it; and the trials of this layer and below
    assert all("forward" not in vars(block) for block in blocks)


def test_a_loss_may_run_the_model_again_or_watch_it(pairs: Callable) -> None:
    """Only the run that the loss is given begins at the layer; under the user's own hooks none does."""
    model = pairs("gpt2").model
    seen: list[torch.Tensor] = []
    watched = model.hf.transformer.h[0].mlp

    def asking(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens.flip(1))[:, -1, 5]

    def watching(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return seen[-1][:, -1, 3]

    handle = watched.register_forward_hook(lambda *call: seen.append(call[2]))
    for loss in (asking, watching):
        value = loss_of(model, loss)
        _, after = losses_without(model, batches_of(model, WRITTEN, 2), value, CHOICES, "zero", 0, "test")
        np.testing.assert_allclose(after, one_by_one(model, value, "zero"), rtol=2e-5, atol=5e-6)
        if loss is asking:
            handle.remove()
            _, after = losses_without(model, batches_of(model, WRITTEN, 2), value, CHOICES, "zero", 0, "test")
            np.testing.assert_allclose(after, one_by_one(model, value, "zero"), rtol=2e-5, atol=5e-6)
            handle = watched.register_forward_hook(lambda *call: seen.append(call[2]))
    handle.remove()


def test_edits_around_it_stay_on(pairs: Callable) -> None:
    model = pairs("gpt2").model
    value = loss_of(model, None)
    with model.edit(hw.ScaleHeads({"0.2": 0.0, "2.1": 0.5})):
        _, after = losses_without(model, batches_of(model, WRITTEN, 2), value, CHOICES, "zero", 0, "test")
        np.testing.assert_allclose(after, one_by_one(model, value, "zero"), rtol=2e-5, atol=5e-6)


def test_resampled_outputs_are_those_of_another_text(pairs: Callable) -> None:
    """Two texts of the same length can only take each other's outputs, here put in place by hand."""
    model = pairs("llama").model
    ids = torch.tensor([TEXTS[0], TEXTS[2]])
    value = loss_of(model, None)
    _, after = losses_without(model, batches_of(model, ids, 2), value, CHOICES[:1], "resample", 5, "test")
    z = model.head_outputs(ids)
    for text, other in ((0, 1), (1, 0)):
        with model.edit(hw.ScaleHeads({"1.0": 0.0}), hw.OffsetHeads({"1.0": z[other, 1, 0]})):
            expected = float(model.loss(ids[text : text + 1]))
        assert float(after[text, 1, 0]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(AnalysisError, match="no other example has the 9 tokens of example 1"):
        analyses.head_importance(model, WRITTEN[:2], how="ablation", ablation="resample")


def test_heads_that_can_only_be_read_are_not_taken_for_heads_without_effect() -> None:
    model = hw.load(zoo.build("gptj"))
    for ask in (analyses.all_but_one, analyses.head_significance):
        with pytest.raises(EditError, match="can not be edited"):
            ask(model, zoo.inputs("gptj")["input_ids"])
