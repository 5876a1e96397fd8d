"""nnsight and Headwater on one model: a trace halves the residual stream while Headwater's edit switches off a head."""

import torch
from nnsight import NNsight
from transformers import LlamaConfig, LlamaForCausalLM

import headwater as hw

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2,
)  # fmt: skip
model = hw.load(LlamaForCausalLM(config).eval())  # random weights; any transformers model
traced = NNsight(model.hf)  # the same model: inside of a trace its attention is Headwater's still
tokens = torch.randint(0, 1000, (1, 12))
plain = model(tokens)

with torch.no_grad(), model.edit(hw.ScaleHeads({"1.3": 0.0})), traced.trace(tokens):
    traced.model.layers[0].output[:] = traced.model.layers[0].output * 0.5
    heads = traced.model.layers[1].self_attn.o_proj.input.save()  # side by side, as the edit left them
    logits = traced.lm_head.output.save()

sizes = heads.unflatten(-1, (8, -1)).abs().amax((0, 1, 3))
print("largest entry of each head of layer 1:", [round(float(size), 4) for size in sizes])
print("largest change of a logit:", round(float((logits - plain).abs().max()), 4))
print("outside of both the model is as it was:", torch.equal(model(tokens), plain))
