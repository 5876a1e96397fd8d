"""Position-invariant reading: permuting documents leaves what follows them as it is; scores against plain loops.

Seen to fail: the own document not at the end of the region, queries turned the wrong way.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

import headwater as hw
from headwater.lens.errors import EditError

DOCS = [[5, 8, 13, 4], [9, 22, 7], [31, 6, 40, 12, 3]]
PREFIX, SUFFIX = [11, 4, 19], [50, 23, 18, 5]


def strong(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in key:
                weight.mul_(4.0)
    return model.eval()


def rotary(name):
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
             "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(1)
    if name == "neox":
        return strong(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, rotary_pct=0.5)))
    if name == "qwen3":
        return strong(Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=8)))
    return tiny_models.tiny("llama")


def prompt(order):
    spans, ids = [], list(PREFIX)
    for n in order:
        spans.append([len(ids), len(ids) + len(DOCS[n])])
        ids += DOCS[n]
    return torch.tensor([ids + SUFFIX]), spans


@pytest.mark.parametrize("name", ["llama", "neox", "qwen3"])
def test_permuting_documents_changes_nothing_behind_them(name):
    model = hw.load(rotary(name))
    found, plain, texts = [], [], []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]):
        ids, spans = prompt(order)
        plain.append(model(ids)[0, -len(SUFFIX) :])
        with model.edit(hw.PositionInvariant(spans)):
            found.append(model(ids)[0, -len(SUFFIX) :])
            texts.append(model.generate(ids, 5)[0, -5:])
    for other, text in zip(found[1:], texts[1:], strict=True):
        torch.testing.assert_close(other, found[0], atol=2e-4, rtol=1e-4)
        assert text.equal(texts[0])
    assert (plain[1] - plain[0]).abs().max() > 1e-2, "without it the order must matter, or this tests nothing"


def test_a_cache_gives_what_the_whole_text_gives():
    model = hw.load(rotary("llama"))
    ids, spans = prompt([0, 1, 2])
    with model.edit(hw.PositionInvariant(spans), hw.Knockout(-1, 0)):
        found = model.generate(ids, 6)
        step = ids
        while step.shape[1] < found.shape[1]:
            step = torch.cat([step, model(step)[:, -1].argmax(-1, keepdim=True)], -1)
    assert found.equal(step)


def turned(x, place, theta=10000.0):
    half = len(x) // 2
    angle = place / theta ** (torch.arange(half).double() * 2 / len(x))
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def test_first_layer_weights_are_those_of_plain_loops():
    """The algorithm token by token in the first layer, on queries and keys from the model's own projections."""
    hf = rotary("llama")
    model = hw.load(hf)
    ids, spans = prompt([2, 0, 1])
    block = hf.model.layers[0]
    with torch.no_grad():
        x = block.input_layernorm(hf.model.embed_tokens(ids))[0]
        q = block.self_attn.q_proj(x).reshape(-1, 4, 8).double()
        k = block.self_attn.k_proj(x).reshape(-1, 2, 8).repeat_interleave(2, 1).double()
    end = spans[-1][1]
    owner = {p: n for n, (a, b) in enumerate(spans) for p in range(a, b)}
    expected = torch.zeros(4, len(x), len(x)).double()
    for h in range(4):
        for i in range(len(x)):
            readers = range(*spans[owner[i]]) if i in owner else [i]
            weigh = torch.zeros(len(spans)).double()
            for r in readers if i >= spans[0][0] else []:
                others = [p for p in owner if owner[p] != owner.get(r)]
                soft = torch.stack([q[r, h] @ k[p, h] / 8**0.5 for p in others]).softmax(0)
                for p, w in zip(others, soft, strict=True):
                    weigh[owner[p]] += w / (spans[owner[p]][1] - spans[owner[p]][0])
            if i in owner:
                weigh[owner[i]] = 1e9
            order = weigh.argsort(descending=True).tolist()
            place, edge = {}, end
            for n in order:
                a, b = spans[n]
                place |= {p: edge - (b - p) for p in range(a, b)}
                edge -= b - a
            own = place[i] if i in owner else i
            row = {}
            for j in range(len(x)):
                if j <= i or (i in owner and j in owner and owner[i] != owner[j]):
                    row[j] = (
                        turned(q[i, h], own)
                        @ turned(k[j, h], place.get(j, j) if i >= spans[0][0] else j)
                        / 8**0.5
                    )
            weights = torch.stack(list(row.values())).softmax(0)
            expected[h, i, list(row)] = weights
    with model.edit(hw.PositionInvariant(spans)):
        record = model.record(ids)
    torch.testing.assert_close(record.pattern(0)[0].double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "reason"), [
    ("gpt2", "no rotary positions"), ("mistral", "window"), ("gptoss", "window or learned sinks"),
    ("bert", "no causal language model"),
])  # fmt: skip
def test_a_model_that_can_not_be_read_so_is_refused_by_name(name, reason):
    model = hw.load(tiny_models.tiny(name))
    with pytest.raises(EditError, match=f"PositionInvariant: .* can not be read so: .*{reason}"):
        model.edit(hw.PositionInvariant([[1, 3], [3, 5]]))


def test_several_texts_and_short_prompts_are_refused():
    model = hw.load(rotary("llama"))
    with model.edit(hw.PositionInvariant([[1, 3], [3, 5]])):
        with pytest.raises(EditError, match="one text at a time"):
            model(torch.tensor([[5, 6, 7, 8, 9, 4]] * 2))
        with pytest.raises(EditError, match="no position 4 in a prompt of 3 tokens"):
            model(torch.tensor([[5, 6, 7]]))
    read = hw.edit_from_dict(hw.PositionInvariant([[1, 3], [3, 5]]).to_dict())
    assert read == hw.PositionInvariant(((1, 3), (3, 5)))
