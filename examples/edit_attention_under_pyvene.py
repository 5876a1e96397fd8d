"""pyvene and Headwater on one model: pyvene halves the residual stream while Headwater's edit switches off a head."""

import pyvene
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwater as hw

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2,
)  # fmt: skip
model = hw.load(LlamaForCausalLM(config).eval())  # random weights; any transformers model
tokens = torch.randint(0, 1000, (1, 12))
plain = model(tokens)

halved = {"component": "model.layers[0].output", "intervention": lambda base, source: base * 0.5}
changed = pyvene.IntervenableModel(halved, model=model.hf)  # its attention is Headwater's still
with model.edit(hw.ScaleHeads({"1.3": 0.0})):
    heads = model.head_outputs(tokens)
    both = changed({"input_ids": tokens})[1].logits
alone = changed({"input_ids": tokens})[1].logits

print("head 1.3 under the edit:", float(heads[:, 1, 3].abs().max()))
print("largest change of a logit by pyvene:", round(float((alone - plain).abs().max()), 4))
print("and by the edit beside it:", round(float((both - alone).abs().max()), 4))
print("outside of both the model is as it was:", torch.equal(model(tokens), plain))
