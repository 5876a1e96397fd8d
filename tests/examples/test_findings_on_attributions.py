"""One number of each example on attributions and photographs, recomputed with transformers' eager attention."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Dinov2Model, LlamaForCausalLM

from headwater import analyses
from headwater.lens.trained.registry import added_folder

TEXT = "When Mary and John went to the store, John gave a drink to"


def test_rollout_with_and_without_the_sink(smollm2) -> None:
    eager = LlamaForCausalLM.from_pretrained(added_folder("smollm2-135m"), attn_implementation="eager").eval()
    ids = torch.tensor(smollm2.tokenizer(TEXT)["input_ids"])[None]
    with torch.no_grad():
        layers = [each[0].double() for each in eager(ids, output_attentions=True).attentions]
    length = ids.shape[1]
    share = torch.stack(layers).sum(2) / torch.arange(length, 0, -1)  # by the queries that see a key
    share[..., -(length // 4) :] = torch.nan  # seen by too few
    sinks = torch.nanmean(share, dim=(0, 1)) > 0.3
    assert sinks.nonzero()[:, 0].tolist() == [0]
    record = smollm2.record(ids)
    for without, kept in ((None, torch.ones(length)), ("sinks", (~sinks).double())):
        row = torch.eye(length, dtype=torch.float64)[-1]
        for layer in reversed(layers):
            mixed = layer.mean(0) * kept + torch.eye(length)
            row = row @ (mixed / mixed.sum(-1, keepdim=True))
        found = analyses.rollout(record, without=without)
        np.testing.assert_allclose(found.values[0, 0], row, atol=1e-4)
        held = float(row.max()) > 0.9
        assert ("one_token" in found.attrs) == held
    assert found.attrs["set_aside"] == "token 0 ('When')"


def test_distances_on_the_grid(dinov2) -> None:
    eager = Dinov2Model.from_pretrained(added_folder("dinov2-small"), attn_implementation="eager").eval()
    picture = torch.randn(1, 3, 140, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = eager(picture, output_attentions=True).attentions
    places = [(row, column) for row in range(10) for column in range(8)]
    hops = torch.tensor([[max(abs(a - c), abs(b - d)) for c, d in places] for a, b in places])
    found = analyses.patch_distance(dinov2.record(picture)).mean_hops
    for layer, map in enumerate(maps):
        seen = map[0, :, 1:, 1:]
        expected = ((seen * hops).sum(-1) / seen.sum(-1)).mean(-1)
        np.testing.assert_allclose(found.sel(layer=layer), expected, atol=1e-3)
