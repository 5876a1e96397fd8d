"""The folder of a pipeline of pixels (`pipeline_folder.py`): what is refused, in one line."""

import json
import shutil

import pytest

pytest.importorskip("diffusers")

import tiny_diffusers
import torch
from safetensors.torch import load_file, save_file

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import pipeline_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_diffusers.pixel_pipeline(tmp_path_factory.mktemp("pixels") / "tiny")


def _index(folder, **changed):
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def _config(folder, **changed):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def _embedding(folder, change):
    file = folder / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if name.endswith("token_embedding.weight"))
    save_file({**stored, name: change(stored[name])}, file, {"format": "pt"})


def _fewer_words(folder):
    _embedding(folder, lambda table: table[:5].clone())
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 5}))


def _elsewhere(folder, name):
    """The file or folder as a link to the same beside the model folder."""
    moved = shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(moved)


def _scheduler(folder, **changed):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: _index(f, _class_name="FluxPipeline"), "of a 'FluxPipeline' of diffusers; open it with"),
        (lambda f: _index(f, transformer=["os", "system"]), "no class of diffusers"),
        (lambda f: _index(f, scheduler=["diffusers", "UNet2DModel"]), "no class of diffusers"),
        (lambda f: _index(f, height=0), "height is a whole number"),
        (lambda f: (f / "transformer" / pipeline_folder.WEIGHTS).unlink(), "has no file"),
        (lambda f: _config(f, num_layers=200), "describes"),
        (lambda f: _config(f, num_layers=4000), "at most 2048"),
        (lambda f: _config(f, sample_size=2**14), "sample_size is 16384"),
        (lambda f: _config(f, out_channels=2), "as many channels"),
        (lambda f: _index(f, height=4096, width=4096), "more than 8192 patches of 2 × 2"),
        (lambda f: _index(f, height=3), "multiples of a patch, 2 pixels"),
        (lambda f: _scheduler(f, use_dynamic_shifting=True), "`mu` must be passed"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no folder tokenizer"),
        (lambda f: _index(f, guidance_scale="nan"), "guidance_scale is a number"),
        (lambda f: _index(f, num_inference_steps=2.5), "num_inference_steps is a whole number"),
        (lambda f: _index(f, transformer=["diffusers", "ModelMixin"]), "no class of diffusers"),
        (lambda f: _elsewhere(f, "text_encoder"), "link to a file outside"),
        (lambda f: _elsewhere(f, "tokenizer/tokenizer.json"), "link to a file outside"),
        (lambda f: _elsewhere(f, f"transformer/{pipeline_folder.WEIGHTS}"), "link to a file outside"),
        (
            lambda f: _embedding(f, lambda table: table * float("nan")),
            "text_encoder hold numbers that are not finite",
        ),
        (_fewer_words, "has token 6; the text encoder knows 5"),
        (lambda f: _scheduler(f, stochastic_sampling=True), "draws noise that no seed gives"),
    ],
)
def test_folders_that_are_none_are_refused_in_one_line(folder, tmp_path, change, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    with pytest.raises(ModelError, match=said) as refused:
        hw.load(copy)
    assert "\n" not in str(refused.value)


def test_arguments_that_a_pipeline_does_not_take_are_refused(folder):
    with pytest.raises(ModelError, match="leave tokenizer= and sample= out"):
        hw.load(folder, tokenizer=hw.load("tasks-4l").tokenizer)


def test_without_diffusers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(pipeline_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"headwater\[diffusers\]"):
        hw.load(folder)


def test_weights_that_lack_a_tensor_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "transformer" / pipeline_folder.WEIGHTS
    stored = load_file(file)
    stored.pop("proj_out.bias")
    save_file(stored, file)
    with pytest.raises(ModelError, match=r"proj_out\.bias"):
        hw.load(copy)


def test_the_files_of_a_hubs_cache_are_links_and_open(folder, tmp_path):
    snapshot = shutil.copytree(folder, tmp_path / "models--a--b" / "snapshots" / "main")
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir()
    for n, file in enumerate(sorted(each for each in snapshot.rglob("*") if each.is_file())):
        shutil.move(file, blobs / f"{n}")
        file.symlink_to(blobs / f"{n}")
    assert torch.equal(*(hw.load(each).generate("a dog", output_type="pt") for each in (snapshot, folder)))
