"""All heads of a layer but one taken out, against edits, and the best head judged on examples it was not chosen on.

Mutation seen to fail: the best head judged on the examples it was chosen on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses

GENERATOR = torch.Generator().manual_seed(3)


TEXTS = [torch.randint(3, 60, (n,), generator=GENERATOR).tolist() for n in (6, 9, 6, 9, 9)]


WRITTEN = [" ".join(f"w{token}" for token in text) for text in TEXTS]


def test_all_but_one(pairs: Callable) -> None:
    model = pairs("gpt2").model
    found = analyses.all_but_one(model, WRITTEN, draws=50)
    base = [float(model.loss(text)) for text in WRITTEN]
    for layer, head in ((0, 3), (2, 1)):
        others: dict[str | hw.Head, float] = {f"{layer}.{other}": 0.0 for other in range(4) if other != head}
        with model.edit(hw.ScaleHeads(others)):
            rises = np.subtract([float(model.loss(text)) for text in WRITTEN], base)
        np.testing.assert_allclose(found.per_example[:, layer, head], rises, atol=5e-6)
    chosen = found.choosing.values
    assert chosen.sum() == 3
    for layer in range(3):
        assert found.best[layer] == found.per_example[chosen, layer].mean("batch").values.argmin()
        held = found.per_example[~chosen, layer, int(found.best[layer])].mean()
        assert float(found.best_change[layer]) == pytest.approx(float(held))
    assert np.isnan(analyses.all_but_one(model, WRITTEN[:1], draws=5).best_change).all()


def test_a_layer_of_one_head_is_left_alone(one_head: hw.HookedModel) -> None:
    found = analyses.all_but_one(one_head, torch.tensor([[3, 4, 5], [6, 7, 8]]), draws=5)
    np.testing.assert_allclose(found.change, 0, atol=1e-6)
