"""The exported tree has the public form, its six numbers are those of eager maps, and its pairs are of the maps."""

from __future__ import annotations

import copy
import json
import resource

import corpus_oracle as dense
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwater as hw

PUBLIC = {
    "model_name", "np_model_id", "dataset_name", "heads", "n_layers", "n_heads", "n_intervals", "metrics",
    "metric_descriptions", "head_data_pattern", "has_umap", "umap_heads", "custom_plots", "custom_tables",
    "statistics_display", "pipeline_config",
}  # fmt: skip
NUMBERS = (
    "self_attention_score", "prev_token_score", "pattern_entropy", "qk_distance", "qk_distance_variance",
    "induction_score",
)  # fmt: skip


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def texts(tmp_path):
    """Twenty texts of 40 tokens, some of which repeat."""
    generator = np.random.default_rng(0)
    lines = [" ".join(f"w{n}" for n in generator.integers(3, 20, 40)) for _ in range(20)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file, lines


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_tree(pairs, texts, tmp_path, name) -> None:
    pair, (file, lines) = pairs(name), texts
    found = hw.corpus(pair.model, file, keep=3)
    tree = hw.export_headvis(found, pair.model, tmp_path / "tree", dataset="mine")
    assert not list(tmp_path.glob(".*")) + list(tree.glob("*.lines"))
    config = read(tree / "config.json")
    assert set(config) == PUBLIC
    assert config["pipeline_config"]["n_sequences"] == 20
    ids = [pair.model.tokenizer(line).input_ids for line in lines]
    maps = [pair.maps(torch.tensor([each]))[:, 0].numpy() for each in ids]
    scatter = {(row["layer"], row["head"]): row for row in read(tree / "scatter_data.json")}
    assert list(scatter) == [tuple(each) for each in config["heads"]]
    for layer in range(3):
        wanted = dense.headvis([(one, each[layer]) for one, each in zip(ids, maps, strict=True)])
        got = [[scatter[layer, head][number] for head in range(4)] for number in NUMBERS]
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    for layer, head in ((0, 1), (2, 3)):
        _check_head(read(tree / "heads" / f"L{layer}H{head}.json"), ids, [each[layer, head] for each in maps])


def _check_head(of, ids, maps) -> None:
    largest = [w[1:, 1:].max() for w in maps]
    wanted = np.histogram(np.array(largest), np.linspace(0, 1, 51))[0]
    assert sum(of["histogram"]["bin_values"]) == 20
    assert np.abs(np.array(of["histogram"]["bin_values"]) - wanted).sum() <= 2  # one may lie on an edge
    assert abs(of["statistics"]["mean_max_activation"] - np.mean(largest)) < 0.015
    assert of["statistics"]["n_samples"] == len(of["sequences"])
    top = [one["sequence_id"] for one in of["sequences"] if one["interval"] == 5]
    assert top == sorted(range(20), key=lambda i: -largest[i])[:3]
    intervals = [one["interval"] for one in of["sequences"]]
    assert intervals == sorted(intervals)
    assert max(intervals.count(i) for i in range(1, 5)) <= 3
    for one in of["sequences"]:
        w, n = maps[one["sequence_id"]], one["seq_len"]
        assert one["tokens"] == [f"w{token}" for token in ids[one["sequence_id"]]]
        np.testing.assert_allclose(one["max_activation"], largest[one["sequence_id"]], atol=1e-5)
        query, key = np.divmod(np.array(one["attention_indices"]), n)
        np.testing.assert_allclose(one["attention_values"], w[query, key], atol=6e-5)
        for row in range(n):
            strong = np.sort(w[row])[::-1][:8]
            mine = np.sort(np.array(one["attention_values"])[query == row])[::-1]
            np.testing.assert_allclose(mine, strong[strong >= 0.005][: len(mine)], atol=6e-5)
            assert len(mine) >= (strong > 0.00501).sum()
    mass = np.zeros(13)
    for w in maps:
        for q, k in zip(*np.nonzero(w), strict=True):
            mass[0 if q == k else int(np.log2(abs(q - k))) + 1] += w[q, k]
    np.testing.assert_allclose(of["qk_distance_histogram"]["bin_values"], mass, atol=1e-3)


def test_what_can_not_be_exported_is_refused(pairs, texts, tmp_path) -> None:
    model = pairs("llama").model
    found = hw.corpus(model, texts[0], texts_at_most=2)
    tmp_path.joinpath("there").mkdir()
    for wrong in (
        lambda: hw.export_headvis(found, pairs("gpt2").model, tmp_path / "a"),
        lambda: hw.export_headvis(found.small(), model, tmp_path / "a"),
        lambda: hw.export_headvis(found, model, tmp_path / "there"),
    ):
        with pytest.raises(hw.HeadwaterError):
            wrong()
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_512_and_8192_tokens_without_maps(pairs, tmp_path) -> None:
    """At 512 tokens equal to eager maps; at 8,192 in memory that no map of all heads would fit in."""

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()

    twin = copy.deepcopy(plain)
    model = hw.load(plain, tokenizer=pairs("llama").model.tokenizer)
    generator = np.random.default_rng(1)
    for length in (512, 8192):
        ids = generator.integers(3, 60, length).tolist()
        file = tmp_path / f"{length}.txt"
        file.write_text(" ".join(f"w{n}" for n in ids))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = hw.corpus(model, file)
        tree = hw.export_headvis(found, model, tmp_path / f"tree{length}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if length == 512:
            with torch.no_grad():
                maps = copy.deepcopy(twin).double()(torch.tensor([ids]), output_attentions=True).attentions
            rows = [[row[number] for number in NUMBERS] for row in read(tree / "scatter_data.json")]
            wanted = np.concatenate([dense.headvis([(ids, w[0].numpy())]).T for w in maps])
            np.testing.assert_allclose(rows, wanted, atol=1e-5, rtol=1e-5)
        else:
            assert grown < 8 * 8192**2 * 4  # of one layer's maps, 2 GiB
        assert len(read(tree / "heads" / "L1H7.json")["sequences"]) == 1
