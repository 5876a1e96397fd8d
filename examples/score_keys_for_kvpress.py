"""A press of kvpress that keeps the keys which Headwater scores highest."""

import sys
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

import headwater as hw

try:
    from kvpress import ScorerPress
except ImportError:
    print("not run here: kvpress is not installed (0.5 wants transformers below 5.3)")
    sys.exit()


@dataclass
class HeadwaterPress(ScorerPress):
    """`scores` [layer, kv_head, key] of the text that is read; NaN: always kept."""

    scores: torch.Tensor | None = None

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return self.scores[module.layer_idx][None].nan_to_num(nan=torch.inf)


TEXT = "When Mary and John went to the store , John gave a drink to"
model = hw.load("tasks-4l")
found = hw.analyses.kv_scores(model, TEXT, window=4, sinks=1)
llama = LlamaForCausalLM.from_pretrained(model.hf.name_or_path)
ids = model.to_tokens(TEXT).ids
for by in found.by.values:
    scores = torch.from_numpy(found.by_output.sel(by=by, batch=0).values)
    with HeadwaterPress(0.5, scores)(llama), torch.no_grad():
        cache = llama(ids, use_cache=True).past_key_values
    print(by, "keeps", cache.get_seq_length(), "of", ids.shape[1], "keys of each head")
