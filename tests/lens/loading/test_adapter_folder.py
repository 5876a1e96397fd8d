"""An adapter's folder on its base gives the merged model's numbers; what a stranger writes is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import adapted
import pytest
import torch

import headwater as hw
from headwater.lens.errors import ModelError

IDS = torch.arange(3, 15)[None]
EVERYTHING = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A base and two adapters beside each other, and the merged model's logits under the first."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapters")
    adapted.plain().save_pretrained(root / "base")
    model = adapted.adapted(EVERYTHING, modules_to_save=["lm_head"], use_rslora=True)
    with adapted.quietly():
        model.save_pretrained(root / "lora")
        config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        scales = peft.get_peft_model(adapted.plain(), config)
        with torch.no_grad():
            for name, weight in scales.named_parameters():
                if "ia3" in name:
                    weight.uniform_(0.5, 2.0)
        scales.save_pretrained(root / "ia3")
    for name in ("lora", "ia3"):
        change(root / name, base_model_name_or_path="../base")
    torch.save(adapted.merged(scales.eval())(IDS).logits, root / "ia3.pt")
    return root, adapted.merged(model)(IDS).logits.detach()


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_is_the_merged_model(saved: tuple[Path, torch.Tensor]) -> None:
    root, expected = saved
    found = hw.load(root / "lora")
    torch.testing.assert_close(found(IDS), expected, rtol=1e-4, atol=1e-4)
    base = hw.load(root / "base")
    assert (base(IDS) - expected).abs().max() > 0.1
    assert found.revision != base.revision
    assert found.name == "lora"
    other = hw.load(root / "ia3")
    torch.testing.assert_close(other(IDS), torch.load(root / "ia3.pt"), rtol=1e-4, atol=1e-4)


def test_the_base_may_be_given_or_absolute(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    root, expected = saved
    shutil.copytree(root / "lora", tmp_path / "alone")
    with pytest.raises(ModelError, match="no folder here; give load"):
        hw.load(tmp_path / "alone")
    torch.testing.assert_close(
        hw.load(tmp_path / "alone", base=root / "base")(IDS), expected, rtol=1e-4, atol=1e-4
    )
    change(tmp_path / "alone", base_model_name_or_path=str(root / "base"))
    torch.testing.assert_close(hw.load(tmp_path / "alone")(IDS), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="base is a folder"):
        hw.load(tmp_path / "alone", base="nowhere")
    with pytest.raises(ModelError, match="base= is the model of an adapter's folder"):
        hw.load(root / "base", base=root / "base")
    with pytest.raises(ModelError, match=r"does not fit its base|can not be loaded"):
        hw.load(tmp_path / "alone", base="tasks-4l")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 10**9}, "r is 1000000000"),
    "text for a rank": ({"r": "8"}, "r is '8'"),
    "pattern": ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern is"),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is not taken"),
    "another library": ({"megatron_config": {"a": 1}}, "megatron_config is not taken"),
    "kind": ({"peft_type": "PREFIX_TUNING"}, "kind 'PREFIX_TUNING'"),
    "kind of another type": ({"peft_type": [1]}, r"kind \[1\]"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights is not taken"),
    "biases of the base": ({"bias": "all"}, "bias is not taken"),
    "another rank": ({"r": 3}, "does not fit its base model: RuntimeError: .* size mismatch"),
    "long base": ({"base_model_name_or_path": "x" * 10_000}, "no folder here"),
    "base of nobody": ({"base_model_name_or_path": "~nobody-of-this-name/x"}, "no folder here"),
    "base": ({"base_model_name_or_path": "someone/model"}, "no folder here"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_stranger_may_write(saved: tuple[Path, torch.Tensor], tmp_path: Path, fault: str) -> None:
    root, _ = saved
    shutil.copytree(root / "lora", tmp_path / "lora")
    change(tmp_path / "lora", **({"base_model_name_or_path": str(root / "base")} | FAULTS[fault][0]))
    with pytest.raises(ModelError, match=FAULTS[fault][1]):
        hw.load(tmp_path / "lora")


def test_pickles_links_and_numbers_that_are_none(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    root, _ = saved
    shutil.copytree(root / "lora", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        hw.load(tmp_path / "lora", base=root / "base")
    file.symlink_to(root / "lora" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="outside of the folder"):
        hw.load(tmp_path / "lora", base=root / "base")
    file.unlink()
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first: tensors[first] * float("nan")}, file)
    with pytest.raises(ModelError, match="NaN"):
        hw.load(tmp_path / "lora", base=root / "base")
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    with pytest.raises(ModelError, match="does not fit"):
        hw.load(tmp_path / "lora", base=root / "base")


def test_a_model_with_an_adapter_in_its_folder_is_refused(
    saved: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    root, _ = saved
    shutil.copytree(root / "base", tmp_path / "both")
    shutil.copy(root / "lora" / "adapter_config.json", tmp_path / "both")
    with pytest.raises(ModelError, match="folder of its own"):
        hw.load(tmp_path / "both")
