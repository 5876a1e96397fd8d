"""The folder of a pipeline of pixels (`pipeline_folder.py`): what is refused, in one line.

Seen to fail without each check.
"""

import json
import shutil

import pytest

pytest.importorskip("diffusers")

import tiny_diffusers
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


def _weights(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 200}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: _index(f, _class_name="FluxPipeline"), "of a 'FluxPipeline' of diffusers; open it with"),
        (lambda f: _index(f, transformer=["os", "system"]), "no class of diffusers"),
        (lambda f: _index(f, scheduler=["diffusers", "UNet2DModel"]), "no class of diffusers"),
        (lambda f: _index(f, height=0), "height is a whole number"),
        (lambda f: (f / "transformer" / pipeline_folder.WEIGHTS).unlink(), "has no file"),
        (_weights, "describes"),
    ],
)
def test_folders_that_are_none_are_refused_in_one_line(folder, tmp_path, change, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    with pytest.raises(ModelError, match=said) as refused:
        hw.load(copy)
    assert "\n" not in str(refused.value)


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
