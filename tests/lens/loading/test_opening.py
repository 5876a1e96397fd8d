"""The self-check of a model that is opened: attention read wrongly is caught, and what is right opens."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.attention import function
from headwater.lens.errors import ModelError


def test_the_self_check_catches_attention_that_is_read_wrongly(monkeypatch):
    """A wrong scale, as a model with an unknown convention would have it, must not load."""
    honest = function.ScoreRule
    monkeypatch.setattr(
        function, "ScoreRule", lambda scale, *rest, **more: honest(scale * 1.5, *rest, **more)
    )
    with pytest.raises(ModelError, match="gives other outputs"):
        hw.load(tiny_models.tiny("llama"))


def test_models_in_float64_load_where_eager_gives_nan_under_padding():
    plain = tiny_models.tiny("gemma2").double()
    ids, mask = tiny_models.batch()
    with torch.no_grad():
        expected = plain(ids).logits
    model = hw.load(plain)
    torch.testing.assert_close(model(ids), expected, atol=1e-6, rtol=0)  # eager takes its softmax in float32
    assert model(ids, mask)[mask.bool()].isfinite().all()
