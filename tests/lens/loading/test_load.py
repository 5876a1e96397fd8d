"""Opening models: what is found, what is refused and in which words. Model folders are data from strangers."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import headwater as hw
from headwater.lens.errors import HeadwaterError, ModelError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "small"
    tiny_models.tiny("gpt2").save_pretrained(path)
    return path


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_folder_is_the_model_it_was_saved_from(folder):
    ids, _ = tiny_models.batch()
    model = hw.load(folder)
    assert model.name == "small"
    assert model.revision.startswith("model-sha256:")
    torch.testing.assert_close(model(ids), hw.load(tiny_models.tiny("gpt2"))(ids))


def test_a_path_object_and_a_second_load_of_one_model(folder):
    model = tiny_models.tiny("llama")
    first, second = hw.load(model), hw.load(model)
    ids, _ = tiny_models.batch()
    with first.edit(hw.TowardIdentity(1.0)):
        assert second(ids).equal(first(ids)), "both are the same model, so both see its edits"
    assert hw.load(str(folder)).name == "small"


def with_header(folder, header, size=None, content=bytes(8)):
    """A weight file of a header, with the size that it is said to have."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    size = len(text) if size is None else size
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + content)


def in_its_place(folder, make):
    (folder / "model.safetensors").unlink()
    make(folder / "model.safetensors")


def tensor(first, last):
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]}


def edit_nan(tensors):
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan


BROKEN = {
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is text": (lambda f: (f / "config.json").write_text("{oops"), "line 1, column 2: .* give JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "config is huge": (lambda f: (f / "config.json").write_text(" " * 2**21), "is larger than 1 MiB; a model's config"),
    "remote code": (lambda f: change_config(f, model_type="mine", auto_map={"AutoModel": "evil.py"}), "never runs"),
    "unknown type": (lambda f: change_config(f, model_type="mine"), "can not be read"),
    "no layers": (lambda f: change_config(f, n_layer=-1), "num_hidden_layers is -1"),
    "million layers": (lambda f: change_config(f, n_layer=10**6), "n_layer is 1000000; it may be at most"),
    "many layers": (lambda f: change_config(f, n_layer=3000), "num_hidden_layers is 3000"),
    "huge vocabulary": (lambda f: change_config(f, vocab_size=10**12), "vocab_size is 1000000000000"),
    "claims more than it has": (lambda f: change_config(f, n_embd=4096), "describes .* numbers but"),
    "no context": (lambda f: change_config(f, n_positions=0), "max_position_embeddings is 0"),
    "missing": (
        lambda f: change_weights(f, lambda t: t.pop("transformer.h.1.attn.c_attn.weight")), "lack transformer.h.1",
    ),
    "extra": (lambda f: change_weights(f, lambda t: t.update(surprise=torch.ones(2))), "have unknown surprise"),
    "other shape": (lambda f: change_config(f, n_positions=32), "shapes that do not fit|can not be loaded"),
    "nan": (lambda f: change_weights(f, edit_nan), "NaN or infinite values, first in transformer.h.1.mlp"),
    "0 bytes": (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors can not be read"),
    "a folder": (lambda f: in_its_place(f, Path.mkdir), "is not a plain file"),
    "a pipe": (lambda f: in_its_place(f, os.mkfifo), "is not a plain file"),
    "endless header": (lambda f: with_header(f, {}, 2**62), "model.safetensors can not be read"),
    "overlapping": (lambda f: with_header(f, {"a": tensor(0, 8), "b": tensor(4, 8)}), "safetensors can not be read"),
    "a name twice": (
        lambda f: with_header(f, b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 8)).encode(),) * 2)), "describes|lack",
    ),
    "more bytes": (lambda f: with_header(f, {"a": tensor(0, 8)}, content=bytes(9)), "safetensors can not be read"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "can not be (loaded|read)|describes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(kind, folder):
    do, message = BROKEN[kind]
    do(folder)
    with pytest.raises(ModelError, match=message) as caught:
        hw.load(folder)
    assert "\n" not in str(caught.value)


def test_weights_linked_from_elsewhere_are_refused(folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelError, match="a link to a file outside"):
        hw.load(folder)


def test_names_that_lead_nowhere():
    with pytest.raises(ModelError, match=r"no folder or file is named \./nowhere"):
        hw.load("./nowhere")
    with pytest.raises(ModelError, match="without a network give a local folder"):
        hw.load("gpt2-that-is-not-here")
    with pytest.raises(ModelError, match="name of the model is empty"):
        hw.load(" ")
    with pytest.raises(ModelError, match="not a model of transformers; to open its attention"):
        hw.load(torch.nn.Linear(2, 2))


def hub(monkeypatch, offline=False):
    """A hub that is not to be asked; what lies in its cache may be."""
    import huggingface_hub

    def asked(name, local_files_only=False, **_):
        assert local_files_only, f"{name} was looked up on the hub"
        raise FileNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, name, **_: asked(name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)


def test_a_slip_in_an_embedded_name_is_refused_without_the_network(monkeypatch):
    hub(monkeypatch)
    with pytest.raises(ModelError, match=r"called 'task-4l' .not looked for.*did you mean 'tasks-4l'"):
        hw.load("task-4l")
    with pytest.raises(
        ModelError, match="AssertionError"
    ):  # an owner's name is no slip: this one is looked up
        hw.load("someone/task-4l")


def test_offline_nothing_is_looked_up(monkeypatch):
    hub(monkeypatch, offline=True)
    with pytest.raises(ModelError, match=r"'someone/model' .HF_HUB_OFFLINE is set.; without a network"):
        hw.load("someone/model")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt"])
def test_a_tokenizer_that_is_too_large_is_refused_before_it_is_read(folder, name, monkeypatch):
    (folder / name).write_text("{}" * 2**18)
    monkeypatch.setattr("headwater.lens.examples.settings_files.LARGEST", 2**18)
    with pytest.raises(ModelError, match=r"is larger than .* MiB; such a file is smaller"):
        hw.load(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    with pytest.raises(ModelError, match=r"knows 200 tokens but .* embeds only 97"):
        hw.load(folder, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))


def test_threads_load_at_once() -> None:
    """transformers exchanges functions and the default dtype of torch while it builds a model."""
    names, faults, together = ["tasks-4l", "vit-digits", "tasks-4l", "vit-digits"], [], threading.Barrier(4)

    def load(name: str) -> None:
        together.wait()
        try:
            hw.load(name)
        except HeadwaterError as error:
            faults.append(str(error))

    threads = [threading.Thread(target=load, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert torch.get_default_dtype() == torch.float32
