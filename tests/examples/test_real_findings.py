"""One number of each example on language models, computed again by hooks of torch on the model alone.

Seen to fail: the output of the head beside it, keys of other query heads, a head of the layer below.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import headwater as hw
from headwater import analyses
from headwater.analyses._prompts.examples import repeated_tokens


def outputs(model: hw.HookedModel, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """What enters the output projection of a layer, [batch, position, d_model]."""
    seen = []
    module = model.hf.model.layers[layer].self_attn.o_proj
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    logits(model, ids, hook)
    return seen[0]


def logits(model: hw.HookedModel, ids: torch.Tensor, *hooks: RemovableHandle) -> torch.Tensor:
    with torch.no_grad():
        found = model.hf(input_ids=ids).logits[:, -1]
    for hook in hooks:
        hook.remove()
    return found


def ids_of(model: hw.HookedModel, *words: str) -> list[torch.Tensor]:
    return [model.tokenizer(word, return_tensors="pt")["input_ids"] for word in words]


def test_the_effect_of_a_mover_is_that_of_a_hook(smollm2: hw.HookedModel) -> None:
    example = hw.prompt_set("indirect_object", 1, seed=0, model=smollm2)[0]
    clean, corrupt, right, other = ids_of(
        smollm2, example.prompt, example.corrupt, example.answer, example.wrong[0]
    )
    said = outputs(smollm2, 23, corrupt)[..., 3 * 64 : 4 * 64]

    def put(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        changed = args[0].clone()
        changed[..., 3 * 64 : 4 * 64] = said
        return (changed,)

    def gap(*row: torch.Tensor) -> float:
        return float(row[0][0, right[0, 0]] - row[0][0, other[0, 0]])

    ends = gap(logits(smollm2, clean)), gap(logits(smollm2, corrupt))
    module = smollm2.hf.model.layers[23].self_attn.o_proj
    patched = gap(logits(smollm2, clean, module.register_forward_pre_hook(put)))
    found = analyses.patch(smollm2, [example], how="noise", layers=[23])
    assert float(found[0, 0, 3]) == pytest.approx((patched - ends[0]) / (ends[1] - ends[0]), abs=1e-3)
    assert float(found[0, 0, 3]) > 0.2  # the head that moves the name more than any other


def test_prefix_matching_is_that_of_weights_by_hand(smollm2: hw.HookedModel) -> None:
    length = 12
    ids = repeated_tokens(smollm2, length, 1, 3, smollm2.tokenizer.bos_token_id)
    layer, seen = smollm2.hf.model.layers[17].self_attn, {}
    hooks = [
        getattr(layer, name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    logits(smollm2, ids, *hooks)
    q, k = (seen[name].unflatten(-1, (-1, 64)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    turn = smollm2.hf.model.rotary_emb(q, torch.arange(ids.shape[1])[None])
    q, k = apply_rotary_pos_emb(q, k.repeat_interleave(3, 1), *turn)
    scores = (q @ k.mT / 8).masked_fill(torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), float("-inf"))
    weights = scores.softmax(-1)[0]
    second = range(ids.shape[1] - length, ids.shape[1])
    expected = torch.stack([weights[:, i, i - length + 1] for i in second]).mean(0)
    found = analyses.head_roles(smollm2, length=length, sequences=1, seed=3).sel(role="induction", layer=17)
    torch.testing.assert_close(torch.tensor(found.values).float(), expected, atol=1e-4, rtol=0)
    assert float(found[3]) > 0.3


def test_what_a_head_writes_towards_a_capital_is_its_product_with_the_unembedding(
    smollm2: hw.HookedModel,
) -> None:
    prompt, right, other = ids_of(smollm2, "The capital of Poland is", " Warsaw", " Delhi")
    ends: list[torch.Tensor] = []
    norm = smollm2.hf.model.norm
    z = outputs(smollm2, 23, prompt)[0, -1, 4 * 64 : 5 * 64].double()
    logits(smollm2, prompt, norm.register_forward_pre_hook(lambda _, args: ends.append(args[0].detach())))
    scale = (ends[0][0, -1].double().square().mean() + norm.variance_epsilon).sqrt()
    head = smollm2.hf.model.layers[23].self_attn.o_proj.weight.detach().double()[:, 4 * 64 : 5 * 64]
    unembedding = smollm2.hf.lm_head.weight.detach().double()
    direction = unembedding[right[0, 0]] - unembedding[other[0, 0]]
    expected = float((head @ z / scale * norm.weight.detach().double()) @ direction)
    found = analyses.factual_recall(smollm2, "The capital of Poland is", " Warsaw", " Delhi", draws=100)
    share = float(found.head_share.sel(layer=23, head=4, measure="ic-iw")[0])
    assert share == pytest.approx(expected, rel=1e-3)
    assert share > 1
