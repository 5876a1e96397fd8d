"""A recorder holds no tensor of queries × keys, and names the head whose scores overflow."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import headwater as hw
from headwater.lens.errors import RecordError


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


@pytest.mark.slow
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
