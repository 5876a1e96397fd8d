"""Prompts in, logits out, and what bad input gets; records never hold a queries × keys tensor."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import headwater as hw
from headwater.kernels.maps import statistics as kernel
from headwater.lens.errors import HeadError, ModelError, PromptError, RecordError, ResourceError
from headwater.lens.naming.tokens import to_tokens


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("gpt2"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "without a tokenizer"),
        ([], "prompt is empty"),
        (torch.zeros(1, 0, dtype=torch.long), "prompt is empty"),
        ([[1, 2], [3]], "token ids of equal length"),
        (torch.tensor([[1, 97]]), "token id 97 at batch 0, position 1 is outside of the vocabulary"),
        (torch.tensor([[-1]]), "token id -1"),
        (torch.tensor([[0.5]]), "integers"),
        (torch.ones(1, 65, dtype=torch.long), "65 tokens, the model's context is 64; shorten it by 1"),
        (["a", 3], "mix of texts"),
        (None, "a prompt is a text"),
    ],
)
def test_a_bad_prompt_is_refused_in_one_line(model, prompt, message):
    with pytest.raises(PromptError, match=message) as caught:
        model(prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], "must have the tokens' shape"),
        ([[0, 0, 0]], "no real token"),
        ([[1, 0, 1]], "has a gap"),
    ],
)
def test_a_bad_mask_is_refused(model, mask, message):
    with pytest.raises(PromptError, match=message):
        model(torch.tensor([[5, 6, 7]]), torch.tensor(mask))


def test_texts_are_padded_and_blank_ones_refused():
    class Words:
        pad_token_id, eos_token_id = None, 9

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1, *(len(word) for word in text.split())]}

    found = to_tokens(["a bb", "ccc"], Words())
    assert found.ids.tolist() == [[1, 1, 2], [1, 3, 9]]
    assert found.mask.tolist() == [[True] * 3, [True, True, False]]
    assert to_tokens(["a bb", "ccc"], Words(), side="left").ids.tolist() == [[1, 1, 2], [9, 1, 3]]
    with pytest.raises(PromptError, match=r"empty \(number 1 of 2\)"):
        to_tokens(["a", " "], Words())


def test_words_outside_of_the_vocabulary_are_named():
    trained = hw.load("tasks-4l")
    assert trained.unknown_words(["Mary swam , xylophone", "xylophone ! Mary"]) == ["swam", "xylophone", "!"]
    assert trained.unknown_words("Mary and John") == []
    assert hw.load(tiny_models.tiny("gpt2")).unknown_words("anything") == []


def test_settings_of_a_record_that_make_no_sense(model):
    ids, _ = tiny_models.batch()
    with pytest.raises(RecordError, match="unknown statistic 'entropie': did you mean 'entropy'"):
        model.record(ids, statistics=("entropie",))
    with pytest.raises(RecordError, match="keep must be"):
        model.record(ids, keep=("qq",))
    with pytest.raises(RecordError, match="'mass' needs groups"):
        model.record(ids, statistics=("mass",))
    with pytest.raises(HeadError, match="no attention in layer 9"):
        model.record(ids, layers=[9])
    record = model.record(ids, layers=[1])
    with pytest.raises(HeadError, match="layer 0 is not in the record"):
        record.pattern(0)
    with pytest.raises(HeadError, match=r"no such head: 1.4"):
        record.pattern(1, 4)
    with pytest.raises(RecordError, match="no position 17 in 17"):
        record.pattern(1, 0, queries=17)
    with pytest.raises(RecordError, match="did you mean 'received'"):
        record.statistic("recieved")


@pytest.mark.parametrize(
    ("name", "place"),
    # soft-capped scores are finite unless sums overflow; else the layer after meets what the first one made of it
    [
        ("gpt2", r"0\.0 at batch 0, position 0"),
        ("llama", r"0\.0 at batch 0, position \d"),
        ("gemma2", r"[01]\.0 at batch 0"),
    ],
)
def test_scores_that_overflow_are_named_where_they_begin(name, place):
    hooked = hw.load(tiny_models.tiny(name))
    with torch.no_grad():
        for key, weight in hooked.hf.named_parameters():
            if "attn" in key and weight.dim() == 2:
                weight.mul_(1e20)
    ids, mask = tiny_models.batch()
    with pytest.raises(RecordError, match="NaN or infinite, first in head " + place):
        hooked.record(ids, mask)


def test_more_memory_than_there_is_is_refused_before_running(model, monkeypatch):
    import psutil

    class Little:
        available = 100_000

    ids, _ = tiny_models.batch()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    with pytest.raises(ResourceError, match=r"use keep=\(\) for statistics alone \(\d"):
        model.record(ids.repeat(20, 1))


@pytest.mark.parametrize("keep", [(), ("qk",), ("qkv",)])
def test_the_estimate_is_what_a_record_keeps(keep):
    for name in ("gpt2", "llama", "gemma2"):
        model = hw.load(tiny_models.tiny(name))
        ids, _ = tiny_models.batch()
        settings = {"keep": keep, "statistics": kernel.NAMES, "groups": {"a": [0], "b": [1]}}
        record = model.record(ids, **settings)
        kept = sum(x.nbytes for x in record.statistics.values())
        kept += sum(x.nbytes for m in record.maps.values() for x in (m.q, m.k, m.lse))
        kept += sum(x.nbytes for x in record.values.values())
        assert model.estimate(ids, **settings).bytes == pytest.approx(kept, rel=0.02)


def test_models_without_a_language_head_give_no_logits():
    from transformers import BertConfig, BertModel

    model = hw.load(
        BertModel(
            BertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
            )
        )
    )
    with pytest.raises(ModelError, match=r"no language head, so it gives no logits; use model.embeddings"):
        model(torch.tensor([[5]]))
    with pytest.raises(ModelError, match="can not continue a text"):
        model.generate(torch.tensor([[5]]))
    assert model.embeddings(torch.tensor([[5, 6]])).shape == (1, 2, 16)


def test_loss_is_the_mean_over_real_next_tokens(model):
    ids, mask = tiny_models.batch()
    logits = model(ids[1:, :11])
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1, 1:11])
    torch.testing.assert_close(model.loss(ids, mask)[1], expected)


def test_head_outputs_and_gates(model):
    ids, mask = tiny_models.batch()
    z = model.head_outputs(ids, mask)
    assert z.shape == (2, 3, 4, 17, 8)
    gates = torch.ones(2, 3, 4, requires_grad=True)
    with model.gated(gates):
        loss = model.loss(ids, mask)
    (slope,) = torch.autograd.grad(loss.sum(), gates)
    step = 1e-2
    for row, layer, head in ((0, 0, 1), (1, 2, 3)):
        moved = [torch.ones(2, 3, 4) for _ in range(2)]
        moved[0][row, layer, head] += step
        moved[1][row, layer, head] -= step
        with model.gated(moved[0]):
            up = model.loss(ids, mask)
        with model.gated(moved[1]):
            down = model.loss(ids, mask)
        assert slope[row, layer, head] == pytest.approx(float((up - down)[row] / (2 * step)), abs=2e-4)
    with pytest.raises(hw.HeadwaterError, match="gates must be"):
        model.gated(torch.ones(3, 4))


class NoSquare(TorchDispatchMode):
    """Fails on any tensor that could hold a queries × keys map."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.largest = length, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, stored)
                assert stored < self.length**2 // 2, f"{func} made {tuple(tensor.shape)}"
        return out


def long_model(**more):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return hw.load(
        LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, max_position_embeddings=8192, **more))
    )


def test_no_square_tensor_is_ever_made_at_8192_tokens():
    """Recording, edits, products and padding at S=8192 without one allocation of S×S elements, nor half of that."""
    model = long_model()
    ids = torch.randint(3, 50, (1, 8192))
    mask = torch.ones_like(ids)
    mask[0, 8000:] = 0
    with NoSquare(8192) as guard:
        record = model.record(ids, mask)
        record.map(0).T @ torch.ones(8192, 2)
        record.map(0) @ torch.ones(8192, 2)
        with model.edit(
            hw.Redistribute([0], 0.3), hw.TowardIdentity(0.1), hw.Knockout([5], [3]), hw.Temperature(0.9)
        ):
            model(ids, mask)
    assert guard.largest <= 2**21  # two blocks of scratch, a thirty-second of the square
    with pytest.raises(AssertionError, match="made"), NoSquare(8192):
        record.map(0).dense([0])


def test_peak_memory_stays_far_below_one_map():
    """The resident size grows by less than a fifth of one head's float32 map at S=8192 (256 MB)."""
    import subprocess
    import sys

    code = """
import resource, torch, headwater as hw
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
model = hw.load(LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=16, max_position_embeddings=8192)))
model.record(torch.randint(3, 50, (1, 64)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.record(torch.randint(3, 50, (1, 8192)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000, "kilobytes"
