"""Rollout and flow through encoder, cross-attention and decoder (`_map_steps.py`), held to products of block matrices.

The matrices are written out from transformers' own eager weights. Seen to fail: cross-attention before the
decoder's own, the encoder left out, keys that are counted in the decoder alone.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import transformers

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


def case(family: str) -> tuple[Any, dict[str, Any]]:
    """A model and its inputs: uneven texts on both sides, the decoder padded on the right."""
    given: dict[str, Any] = zoo.inputs(family, lengths=(6, 4) if family != "whisper" else (6, 6))
    given["decoder_input_ids"] = given["decoder_input_ids"][:, :4]
    given["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return zoo.build(family), given


def blocks(
    hf: Any, given: dict[str, Any], row: int, w: float, joined: Any = np.mean
) -> tuple[list[np.ndarray], int]:
    """The matrix of each layer over the real tokens of both sides, the first one first, and the encoder's count."""
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        out = hf(**given, output_attentions=True)
    target = given["decoder_attention_mask"][row].bool().numpy()
    encoder, own, cross = (
        [joined(layer[row].double().numpy(), axis=0) for layer in maps]
        for maps in (out.encoder_attentions, out.decoder_attentions, out.cross_attentions)
    )
    source = (
        given["attention_mask"][row].bool().numpy()
        if "input_ids" in given
        else np.ones(len(encoder[0]), bool)
    )
    n, m = int(source.sum()), int(target.sum())

    def block(side: slice, seen: slice, weights: np.ndarray) -> np.ndarray:
        whole = np.eye(n + m)
        whole[side] *= w
        whole[side, seen] += (1 - w) * weights
        whole[side] /= whole[side].sum(1, keepdims=True)
        return whole

    a, b = slice(0, n), slice(n, n + m)
    found = [block(a, a, layer[source][:, source]) for layer in encoder]
    for mine, across in zip(own, cross, strict=True):
        found += [block(b, b, mine[target][:, target]), block(b, a, across[target][:, source])]
    return found, n


def real_keys(found: Any, row: int, given: dict[str, Any]) -> np.ndarray:
    parts = found.key_part.values
    source, target = (parts == name for name in dict.fromkeys(parts))
    kept = np.zeros(len(parts), bool)
    kept[np.flatnonzero(source)] = given["attention_mask"][row].bool() if "input_ids" in given else True
    kept[np.flatnonzero(target)] = given["decoder_attention_mask"][row].bool()
    return kept


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_rollout_is_the_product_of_the_block_matrices(family: str, heads: str) -> None:
    hf, given = case(family)
    record = hw.load(zoo.build(family)).record(**given)
    found = analyses.rollout(record, queries="all", residual=0.3, heads=heads)  # type: ignore[arg-type]
    up = analyses.rollout(record, queries="all", residual=0.3, heads=heads, keys=[0, -1])  # type: ignore[arg-type]
    for row in (0, 1):
        layers, n = blocks(hf, given, row, 0.3, np.mean if heads == "mean" else np.max)
        product = np.eye(len(layers[0]))
        for layer in layers:
            product = layer @ product
        mine = found.values[row][:, real_keys(found, row, given)]
        np.testing.assert_allclose(mine[: len(product) - n], product[n:], atol=2e-6)
        np.testing.assert_allclose(up.values[row][: len(product) - n], product[n:][:, [0, -1]], atol=2e-6)
    strings = record.key_axis.strings[0] if family != "t5" else record.part("encoder").strings[0]
    if family == "t5":
        assert found.key_token.values[0].tolist() == [*strings, *record.strings[0]]
    assert np.isnan(found.values[1, -1]).all()
    np.testing.assert_allclose(np.nansum(found.values[0], -1), 1, atol=1e-5)


def test_flow_is_the_maximum_flow_of_the_block_matrices() -> None:
    hf, given = case("bart")
    record = hw.load(zoo.build("bart")).record(**given)
    found = analyses.flow(record, normalise=False)
    layers, n = blocks(hf, given, 1, 0.5)
    graph = nx.DiGraph()
    for depth, layer in enumerate(layers):
        for i, j in np.argwhere(layer > 0).tolist():
            graph.add_edge((depth + 1, i), (depth, j), capacity=layer[i, j])
    top = (len(layers), len(layers[0]) - 1)
    wanted = [
        nx.maximum_flow_value(graph, top, (0, j)) if (0, j) in graph else 0 for j in range(len(layers[0]))
    ]
    np.testing.assert_allclose(found.values[1, 0][real_keys(found, 1, given)], wanted, atol=1e-5)
    drawn = analyses.flow_graph(record, row=1)
    assert drawn.number_of_nodes() == (len(layers) + 1) * len(layers[0])
    assert drawn.edges[(6, 6), (5, 2)]["capacity"] == pytest.approx(layers[5][6, 2], abs=1e-6)
    assert n == 4


def test_one_token_and_sinks_and_what_is_refused() -> None:
    _, given = case("t5")
    model = hw.load(zoo.build("t5"))
    one = {"input_ids": given["input_ids"][:1, :1], "decoder_input_ids": given["decoder_input_ids"][:1, :1]}
    found = analyses.rollout(model.record(**one))  # w of each of two layers of cross-attention is kept
    np.testing.assert_allclose(found.values.ravel(), [0.75, 0.25], atol=1e-6)
    record = model.record(**given)
    aside = analyses.rollout(record, without="sinks")
    assert "encoder" in aside.attrs["set_aside"] or "token" in aside.attrs["set_aside"]
    np.testing.assert_allclose(np.nansum(aside.values, -1), 1, atol=1e-5)
    with pytest.raises(AnalysisError, match="heads holds weights of one stack"):
        analyses.rollout(record, heads=np.ones((2, 4)))  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="give the whole record"):
        analyses.rollout(record.part("cross"))
    encoder = analyses.rollout(record.part("encoder"))
    assert encoder.shape == (2, 1, 6)


def test_a_text_that_looks_at_a_picture_through_layers_of_its_own() -> None:
    """Mllama: layers 1 and 3 are cross-attention over the patches, in between the text's own."""
    text = {
        "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    tower = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 16, "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 32,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.MllamaConfig(text_config=text, vision_config=tower, image_token_index=90)
    ids = torch.tensor([[90, 5, 6, 7]])
    given = {
        "input_ids": ids, "pixel_values": torch.randn(1, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.ones(1, 1).long(),
        "aspect_ratio_mask": torch.ones(1, 1, 1).long(), "cross_attention_mask": torch.ones(1, 4, 1, 1).long(),
    }  # fmt: skip
    record = hw.load(transformers.MllamaForConditionalGeneration(config).eval(), sample=given).record(**given)
    product = np.eye(9)  # 5 tokens of the picture, 4 of the text
    for layer in range(4):
        step = np.eye(9)
        part, seen = (record.part("cross"), slice(0, 5)) if layer % 2 else (record, slice(5, 9))
        step[5:] *= 0.5
        step[5:, seen] += 0.5 * part.map(layer).dense()[0].double().mean(0).numpy()
        product = step @ product
    found = analyses.rollout(record, queries="all")
    np.testing.assert_allclose(found[0], product[5:], atol=1e-6)
    assert found.key_token.values[0, 1:6].tolist() == ["0,0", "0,1", "1,0", "1,1", "#90"]
    np.testing.assert_allclose(hw.on_grid(found)[0], product[5:, 1:5].reshape(4, 2, 2), atol=1e-6)
