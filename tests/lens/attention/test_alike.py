"""The short way through the attention function changes no bit, and nothing that is on goes past it."""

from __future__ import annotations

import contextlib

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.kernels.attend import attend
from headwater.kernels.compiled import walks
from headwater.kernels.repeated import Repeated
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import alike, context
from headwater.lens.attention.masks import LazyMask
from headwater.lens.errors import RecordError
from headwater.lens.loading import zoo

IDS = torch.randint(3, tiny_models.VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counted(monkeypatch):
    """How many layers went the short way."""
    calls = []
    whole = Repeated.attend
    monkeypatch.setattr(Repeated, "attend", lambda *given: calls.append(1) or whole(*given))
    return calls


def the_long_way(monkeypatch):
    monkeypatch.setattr(alike, "attended", lambda *given: None)


def everything(model, **given):
    """Statistics and maps of a record, and head outputs."""
    found = model.record(**given, keep="qkv")
    of_layers = {f"map {layer}": found.map(layer).dense() for layer in found.layers}
    return {**found.statistics, **of_layers, "z": model.head_outputs(**given)}


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3", "bert", "t5", "qwen3_moe", "vit"])
def test_every_bit_is_that_of_the_long_way(name, monkeypatch, counted) -> None:
    model = hw.load(zoo.build(name))
    given = zoo.inputs(name, lengths=(11,))
    given.pop("attention_mask", None)
    counted.clear()
    found = everything(model, **given)
    assert counted or name in ("t5", "mistral")  # every layer has a bias, or a short window
    counted.clear()
    the_long_way(monkeypatch)
    exact = everything(model, **given)
    assert not counted
    for what, values in exact.items():
        assert torch.equal(found[what].nan_to_num(), values.nan_to_num()), what


def test_it_is_taken_in_every_layer_of_a_plain_pass(counted) -> None:
    model = hw.load(tiny_models.tiny("llama"))
    counted.clear()
    model.record(IDS)
    assert len(counted) == tiny_models.LAYERS
    model(IDS)
    assert len(counted) == 2 * tiny_models.LAYERS
    with torch.no_grad():
        model.hf(IDS)  # the model itself, as its owner runs it
    assert len(counted) == 3 * tiny_models.LAYERS


def test_it_is_taken_in_a_generation(monkeypatch, counted) -> None:
    model = hw.load(tiny_models.tiny("llama"))
    counted.clear()
    found = model.generate(IDS, max_new_tokens=6, record=True)
    assert len(counted) >= 5 * tiny_models.LAYERS
    the_long_way(monkeypatch)
    exact = model.generate(IDS, max_new_tokens=6, record=True)
    assert torch.equal(found.output, exact.output)
    for name, values in exact.record.statistics.items():
        assert torch.equal(found.record.statistics[name].nan_to_num(), values.nan_to_num()), name


ON = {
    "an edit": lambda model: model.edit(hw.ScaleHeads({"1.2": 0.0})),
    "a tap": lambda model: context.tapping(model.key, context.Tap()),
    "gates": lambda model: context.gated(model.key, torch.ones(1, tiny_models.LAYERS, tiny_models.HEADS)),
    "a backend": lambda model: context.using("blocked"),
    "a discovery": lambda model: context.discovering(),
    "gradients": lambda model: contextlib.nullcontext(),
}


@pytest.mark.parametrize("what", ON)
def test_nothing_that_is_on_goes_past(what, counted) -> None:
    model = hw.load(tiny_models.tiny("llama"))
    counted.clear()
    with ON[what](model):
        model.record(IDS, grad=what == "gradients")
    assert not counted
    model.record(IDS)
    assert len(counted) == tiny_models.LAYERS


def test_padding_goes_the_long_way(counted) -> None:
    model = hw.load(tiny_models.tiny("llama"))
    counted.clear()
    model.record(IDS.expand(2, -1), attention_mask=torch.tensor([[0, 0, *[1] * 7], [1] * 9]))
    assert not counted


def test_dense_weights_go_the_long_way(counted) -> None:
    model = hw.load(tiny_models.tiny("llama"))
    counted.clear()
    with torch.no_grad():
        weights = model.hf(IDS, output_attentions=True).attentions
    assert not counted
    assert torch.allclose(weights[0].sum(-1), torch.ones(()))


def test_scores_that_overflow_are_told_of(counted) -> None:
    hf = tiny_models.tiny("llama")
    model = hw.load(hf)
    counted.clear()
    with torch.no_grad():
        hf.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.inf
    with pytest.raises(RecordError, match=r"NaN or infinite, first in head 1\.0"):
        model.record(IDS)
    assert counted


def test_an_edit_that_begins_within_a_pass_is_not_passed_by(counted) -> None:
    hf = tiny_models.tiny("llama")
    model = hw.load(hf)
    counted.clear()
    plain = model(IDS)
    with contextlib.ExitStack() as stack:

        def begin(*_):
            stack.enter_context(model.edit(hw.ScaleHeads({"2.1": 0.0})))

        handle = hf.model.layers[1].register_forward_hook(begin)
        found = model(IDS)
        handle.remove()
    with model.edit(hw.ScaleHeads({"2.1": 0.0})):
        exact = model(IDS)
    assert torch.equal(found, exact)
    assert not torch.equal(found, plain)
    assert len(counted) == tiny_models.LAYERS + 2


def test_layers_that_are_not_alike_each_go_their_way(counted) -> None:
    q, k, v = (torch.randn(1, n, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    given = LazyMask(Mask(5, 5, right=0), 1)
    with torch.no_grad():
        for scale, more in ((0.5, 1), (0.5, 1), (0.25, 1), (0.5, 2), (0.5, 1)):
            found = alike.attended(object(), 0, q * more, k.to(q), v, given, scale)
            exact, _ = attend(q * more, k, v, ScoreRule(scale, given.mask))
            assert torch.equal(found, exact.transpose(1, 2))
        found = alike.attended(object(), 0, q.double(), k.double(), v.double(), given, 0.5)
        assert found.dtype == torch.float64
        assert alike.attended(object(), 0, q, k, v.double(), given, 0.5) is None
        assert len(counted) == 6
        narrower = LazyMask(Mask(5, 5, left=1, right=0), 1)
        assert alike.attended(object(), 0, q, k, v, narrower, 0.5) is None
        assert alike.attended(object(), 0, q[:, :, :4], k, v, given, 0.5) is None
    assert alike.attended(object(), 0, q, k, v, given, 0.5) is None
    assert len(counted) == 6


def test_layers_whose_backend_depends_on_their_numbers_go_the_long_way(monkeypatch, counted) -> None:
    pytest.importorskip("numba", reason="the compiled loops need the extra [fast]")
    monkeypatch.setattr(walks, "LEAST", 0)
    hf = tiny_models.tiny("llama")
    model = hw.load(hf)
    first = hf.model.layers[0].self_attn
    with torch.no_grad():  # its largest numbers might overflow, and do not
        for weight, size in ((first.q_proj.weight, 1e19), (first.k_proj.weight, 1e20)):
            weight.zero_()
            weight[0 if size == 1e19 else -1] = size
    ids = torch.randint(3, tiny_models.VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    counted.clear()
    found = model.record(ids)
    the_long_way(monkeypatch)
    exact = model.record(ids)
    assert not counted
    for name, values in exact.statistics.items():
        assert torch.equal(found.statistics[name].nan_to_num(), values.nan_to_num()), name
