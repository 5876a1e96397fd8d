"""Statistics of every attention map of a long prompt in linear memory, and an exact window of one map."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwater as hw

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=8192,
)  # fmt: skip
model = hw.load(LlamaForCausalLM(config))  # any transformers model; this one has random weights
tokens = torch.randint(0, 1000, (1, 4096))

print("it will take", model.estimate(tokens))
record = model.record(tokens, statistics=("entropy", "received"))
print(record.statistic("entropy").mean(("batch", "query")).round(3).to_pandas())

window = record.pattern(layer=1, head=3, queries=slice(-4, None), keys=slice(-6, None))
print("the last four queries on the last six keys:", window[0], sep="\n")

reach = record.map(1).T @ torch.ones(4096, 1)  # what each key receives, from the operator
print("sum of all weights:", round(float(reach.sum()) / 8, 2), "per head, for", tokens.shape[1], "queries")
