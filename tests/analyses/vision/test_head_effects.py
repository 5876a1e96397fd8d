"""head_effects against transformers' own model, whose heads are silenced at the output projection.

Seen to fail: the two ways exchanged, heads and layers exchanged, the divergence of logits, the state of a patch, labels
left out, `accuracy` of a wrong answer that stays wrong counted as a loss.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine, jensenshannon
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTForImageClassification

import headwater as hw
from headwater.lens.errors import AnalysisError

LAYERS, HEADS, WIDTH, CLASSES = 2, 3, 4, 5
PICTURES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def classifier() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HEADS * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=16,
        image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, initializer_range=0.6,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def silenced(hf, layer: int, heads: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and the class token behind the last block, with some heads cut off by hand."""

    def cut(module, args):
        z = args[0].clone().unflatten(-1, (HEADS, WIDTH))
        z[..., heads, :] = 0
        return (z.flatten(-2),)

    stop = hf.vit.layers[layer].attention.o_proj.register_forward_pre_hook(cut)
    with torch.no_grad():
        out = hf(pixel_values=PICTURES, output_hidden_states=True)
    stop.remove()
    return out.logits.softmax(-1).double().numpy(), out.hidden_states[-1][:, 0].double().numpy()


@pytest.mark.parametrize("given", [True, False])
def test_every_measure_of_every_head_in_both_directions(given):
    eager = classifier()
    p, c = silenced(eager, 0, [])
    labels = np.array([0, 1, 2, 3, 1, 1]) if given else p.argmax(-1)
    more = {"label": torch.from_numpy(labels)} if given else {}
    model = hw.load(copy.deepcopy(eager))
    found = hw.analyses.head_effects(
        model, model.to_tokens(PICTURES, **more), draws=20, batch_size=4, by_class=True
    )
    assert found.attrs["classes"] == ("given" if given else "predicted")
    assert found.attrs["chance"] == 1 / CLASSES
    rows = np.arange(len(labels))
    for layer in range(LAYERS):
        for head in range(HEADS):
            for way, gone in ("removed", [head]), ("alone", [h for h in range(HEADS) if h != head]):
                q, d = silenced(eager, layer, gone)
                right = [(x.argmax(-1) == labels).astype(float) for x in (p, q)]
                expected = {
                    "probability": p[rows, labels] - q[rows, labels],
                    "accuracy": right[0] - right[1],
                    "divergence": [jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)],
                    "state": [cosine(a, b) for a, b in zip(c, d, strict=True)],
                }
                for measure, values in expected.items():
                    at = {"measure": measure, "way": way, "layer": layer, "head": head}
                    assert found.per_example.sel(at).values == pytest.approx(values, abs=2e-6), at
                    assert float(found.effect.sel(at)) == pytest.approx(np.mean(values), abs=2e-6)
                    if given:
                        ones = np.mean([v for v, y in zip(values, labels, strict=True) if y == 1])
                        assert float(found.of_class.isel({"class": 1}).sel(at)) == pytest.approx(
                            ones, abs=2e-6
                        )
    assert np.isnan(found.of_class.isel({"class": 4})).all() or not given
    assert (found.low <= found.effect + 1e-12).all()
    assert (found.effect <= found.high + 1e-12).all()


def test_a_tower_without_classes_tells_how_far_its_state_turns():
    config = CLIPVisionConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    model = hw.load(CLIPVisionModel(config).eval())
    found = hw.analyses.head_effects(model, torch.randn(2, 3, 8, 8), draws=5)
    assert found.measure.values.tolist() == ["state"]
    plain = model.embeddings(torch.ones(1, 3, 8, 8))[0, 0]
    with model.edit(hw.ScaleHeads({"1.0": 0.0})):
        cut = model.embeddings(torch.ones(1, 3, 8, 8))[0, 0]
    one = hw.analyses.head_effects(model, torch.ones(1, 3, 8, 8), draws=5)
    expected = cosine(plain.double().numpy(), cut.double().numpy())
    assert float(one.effect.sel(measure="state", way="removed", layer=1, head=0)) == pytest.approx(
        expected, abs=1e-6
    )


def test_a_model_that_sees_nothing_is_refused_by_name():
    with pytest.raises(AnalysisError, match="sees no pictures; see head_importance"):
        hw.analyses.head_effects(hw.load("tasks-4l"), ["Mary gave John a drink"])
