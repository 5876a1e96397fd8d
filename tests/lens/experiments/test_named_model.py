"""`faults.py` and `named_model.py`: what a file names is found in its folder or nowhere, and faults name the key."""

import pytest

from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.named_model import load_named


@pytest.mark.parametrize("name", ["/etc", "../model", "./absent", "a b"])
def test_models_elsewhere_are_refused(name, tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "model").mkdir()
    with pytest.raises(ExperimentError, match="not in the sweep's folder"):
        load_named(name, folder, "float32", "sweep")


def test_the_precision_and_the_first_token_are_those_that_are_asked():
    model = load_named("tasks-4l", None, "float64", prepend_bos=False)
    assert str(model.dtype) == "torch.float64"
    assert model.prepend_bos is False
