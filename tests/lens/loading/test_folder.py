"""Folders from strangers can not choose what is opened, whose code runs, or how much memory is taken.

Seen to fail on the code that gave such folders to transformers as they were, and with each check left out.
"""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.tiny("gpt2").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def sharded(folder: Path, name: str = "first.safetensors") -> dict[str, torch.Tensor]:
    """The same weights in two files, of which the index calls the first `name`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {name: names[::2], "second.safetensors": names[1::2]}
    save_file({n: tensors[n] for n in names[1::2]}, folder / "second.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, held in halves.items() for n in held}}
    (folder / INDEX).write_text(json.dumps(index))
    return {n: tensors[n].clone() for n in names[::2]}


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        hw.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_weights_in_several_files_are_the_same_model(folder: Path) -> None:
    ids, _ = tiny_models.batch()
    whole = hw.load(folder)(ids)
    save_file(sharded(folder), folder / "first.safetensors", {"format": "pt"})
    torch.testing.assert_close(hw.load(folder)(ids), whole)


READ_BESIDE = (
    "config.json", "tokenizer.json", "generation_config.json", "additional_chat_templates/a.jinja", "source.spm",
    "bpe.codes",
)  # fmt: skip


@pytest.mark.parametrize("name", READ_BESIDE)
def test_no_file_that_is_read_is_a_link_to_elsewhere(name: str, folder: Path, tmp_path: Path) -> None:
    elsewhere, link = tmp_path / "elsewhere", folder / name
    elsewhere.write_bytes(link.read_bytes() if link.exists() else b"{}")
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    refused(folder, "is a link to a file outside of the folder; copy the file")


def test_a_folder_of_templates_can_not_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    refused(folder, "is a link to a file outside")
    (folder / "additional_chat_templates").unlink()
    (folder / "notes.md").symlink_to(tmp_path / "elsewhere")  # which nobody reads
    hw.load(folder)


@pytest.mark.parametrize("kept", ["snapshots", "others"])
def test_only_a_hubs_cache_keeps_its_files_in_blobs_beside_the_folder(
    kept: str, folder: Path, tmp_path: Path
) -> None:
    home = tmp_path / kept / "main"
    home.parent.mkdir()
    folder.rename(home)
    (tmp_path / "blobs").mkdir()
    (home / "config.json").rename(tmp_path / "blobs" / "digest")
    (home / "config.json").symlink_to(tmp_path / "blobs" / "digest")
    if kept == "snapshots":
        hw.load(home)
    else:
        refused(home, "is a link to a file outside of the folder")


def test_a_folder_within_holds_no_link_to_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Processors keep a second tokenizer there."""
    (tmp_path / "elsewhere").write_text("{}")
    (folder / "qformer_tokenizer").mkdir()
    (folder / "qformer_tokenizer" / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    refused(folder, "is a link to a file outside of the folder; copy the file")


def test_an_index_can_not_name_a_pickle(folder: Path) -> None:
    torch.save(sharded(folder, "benign.bin"), folder / "benign.bin")
    refused(folder, r"index.json names 'benign.bin', which is no \*.safetensors file of the folder")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "ABSOLUTE", "sub/inside.safetensors", "absent.safetensors"]
)
def test_an_index_can_not_name_a_file_elsewhere(name: str, folder: Path, tmp_path: Path) -> None:
    name = str(tmp_path / "outside.safetensors") if name == "ABSOLUTE" else name
    (folder / "sub").mkdir()
    tensors = sharded(folder, name)
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        save_file(tensors, place, {"format": "pt"})
    refused(folder, "which is no .*file of the folder")


@pytest.mark.parametrize(
    ("held", "words"),
    [("[]", "has no weight_map"), ('{"weight_map": [1]}', "has no weight_map"), ("{", "give JSON"),
     ('{"weight_map": {"a": 5}}', "names 5, which is no"), ('{"weight_map": {"a": ["x"]}}', "which is no")],
)  # fmt: skip
def test_an_index_of_odd_types_is_refused(held: str, words: str, folder: Path) -> None:
    (folder / INDEX).write_text(held)
    refused(folder, words)


def test_adapters_and_pickles_beside_the_weights_are_refused_by_name(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    hw.load(folder)
    for name, words in (("adapter_config.json", "an adapter, .*merge"), ("spk_dict.pt", "a pickle")):
        (folder / name).write_text("{}")
        refused(folder, f"holds {name}: {words}")
        (folder / name).unlink()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_the_config_can_not_choose_whose_code_computes_attention(field: str, folder: Path) -> None:
    ids, _ = tiny_models.batch()
    expected = hw.load(folder)(ids)
    change(folder, **{field: "someone/kernel"})
    model = hw.load(folder)
    torch.testing.assert_close(model(ids), expected)
    assert "someone" not in str(model.hf.config)


def test_nor_can_a_part_of_it(tmp_path: Path) -> None:
    zoo.build("clip").save_pretrained(tmp_path)
    part = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    change(tmp_path, vision_config=part | {"attn_implementation": "someone/kernel"})
    assert "someone" not in str(hw.load(tmp_path).hf.config)


@pytest.mark.parametrize("field", ["num_labels", "n_layer", "num_experts", "encoder_layers"])
def test_counts_are_bounded_before_lists_of_their_length_are_made(field: str, folder: Path) -> None:
    change(folder, **{field: 300_000})
    tracemalloc.start()
    refused(folder, f"{field} is 300000; it may be at most 262144")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    change(folder, **{field: 3, "text_config": {"deep": [{field: -(10**9)}]}})
    refused(folder, f"{field} is -1000000000")


def test_tables_that_a_model_computes_are_bounded(tmp_path: Path) -> None:
    """A mask of GPT-Neo has a number for each pair of positions, its weights one row for each."""
    shape = {"vocab_size": 10, "hidden_size": 4, "num_heads": 1, "num_layers": 1}
    config = transformers.GPTNeoConfig(**shape, attention_types=[[["global"], 1]], max_position_embeddings=16)
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.wpe.weight"] = torch.zeros(30_000, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    change(tmp_path, max_position_embeddings=30_000)
    refused(tmp_path, r"describes tables of 900,000,\d+ bytes for weight files of 48")


def test_layers_are_bounded_by_the_tensors_before_they_are_made(tmp_path: Path) -> None:
    """A layer of no weights takes time and memory all the same: 262,144 of a ResNet, minutes and gigabytes."""
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    change(tmp_path, depths=[2**18, 1])
    refused(tmp_path, r"more than 4,\d00 modules, which the tensors")
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(5000)))  # anybody else makes as many as before


ODD = [
    {"architectures": 5}, {"architectures": [5]}, {"architectures": {"a": 1}}, {"model_type": 5},
    {"n_head": "many"}, {"n_embd": 1.5}, {"n_embd": None}, {"n_layer": [2]}, {"activation_function": 5},
    {"layer_norm_epsilon": "x"}, {"vocab_size": {}}, {"id2label": 5}, {"dtype": 5}, {"torch_dtype": "evil"},
    {"quantization_config": 5}, {"rope_scaling": 5}, {"auto_map": 5, "model_type": "x"}, {"eos_token_id": "x"},
    {"model_type": ["gpt2"]}, {"configuration_files": ["config.4.0.0.json"]}, {"transformers_weights": "benign.bin"},
    {"text_config": {"checkpoint_path": "/etc/passwd"}}, {"text_config": 5},
]  # fmt: skip


@pytest.mark.parametrize("fields", ODD, ids=str)
def test_odd_types_end_in_one_line(fields: dict[str, Any], folder: Path) -> None:
    change(folder, **fields)
    try:
        hw.load(folder)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config asks for 'fp8', whose kernels",
        ),
        ({"quantization_config": {"quant_method": "torchao"}}, "asks for 'torchao'"),
        ({"quantization_config": "gptq"}, "asks for 'gptq'"),
        (
            {"text_config": {"compression_config": {"quant_method": "x/y"}}},
            "compression_config asks for 'x/y'",
        ),
        ({"backbone": "someone/resnet"}, "backbone is 'someone/resnet', which is looked up elsewhere"),
        ({"backbone_config": {"model_type": "timm_backbone"}}, "timm_backbone is code of the package timm"),
        ({"model_type": "timm_wrapper"}, "timm_wrapper is code of the package timm"),
    ],
    ids=str,
)
def test_the_config_can_not_have_kernels_or_backbones_looked_up(
    fields: dict[str, Any], words: str, folder: Path
) -> None:
    change(folder, **fields)
    refused(folder, words)


def test_ctrl_c_while_weights_are_tied_prints_no_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = transformers.PreTrainedModel.tie_weights

    def tie(self: Any, missing_keys: Any = None, **more: Any) -> Any:
        if missing_keys is not None:
            raise KeyboardInterrupt
        return plain(self, missing_keys=missing_keys, **more)

    monkeypatch.setattr(transformers.PreTrainedModel, "tie_weights", tie)
    log = logging.getLogger("transformers.modeling_utils")
    log.addHandler(caplog.handler)
    before = list(log.filters)
    try:
        with pytest.raises(KeyboardInterrupt):
            hw.load(folder)
        assert caplog.text == ""
        assert log.filters == before
    finally:
        log.removeHandler(caplog.handler)
