"""`convert.py`: what is read from GGUF and ONNX files is what was written into them."""

import hashlib
import sys

import pytest
import tiny_models
from fake_package import NAME, FakePackage

from headwater.lens.errors import ModelError
from headwater.lens.loading.trained import add_trained
from headwater.lens.trained.convert import check_reader, weights_digest


def test_the_digest_of_weights_is_of_names_types_shapes_and_bytes(fake_package: FakePackage) -> None:
    folder = add_trained(NAME)
    model = tiny_models.tiny("llama")
    expected = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        expected.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert weights_digest(folder) == expected.hexdigest()


@pytest.mark.parametrize(("form", "package"), [("gguf", "gguf"), ("gguf", "accelerate"), ("onnx", "onnx")])
def test_a_missing_reader_names_its_extra(form: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"takes the package {package}, .*pip install 'headwater\[real\]'"):
        check_reader(form)
