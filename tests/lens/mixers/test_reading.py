"""Effective maps are held to transformers' own functions by their slopes; `forms.py`, `kernel_calls.py` and
`effective_map.py` are tested through them."""

import inspect
import sys
from typing import Any

import pytest
import torch
from hybrid_models import built, hybrid, remembering
from torch import Tensor, nn

import headwater as hw
from headwater.kernels.mixers.recurrence import RecurrenceMap
from headwater.lens.errors import ModelError
from headwater.lens.mixers import forms
from headwater.lens.mixers.effective_map import EffectiveMap

# transformers' function, its argument that holds the values, what to leave out, and how both become [batch, head, s, c]
BY_HEAD = lambda x: x.transpose(1, 2)  # noqa: E731
BY_CHANNEL = lambda x: x[..., None]  # noqa: E731
FUNCTIONS: dict[str, tuple[str, str, tuple[str, ...], Any]] = {
    "qwen3_next": ("torch_chunk_gated_delta_rule", "value", (), BY_HEAD),
    "olmo_hybrid": ("torch_chunk_gated_delta_rule", "value", (), BY_HEAD),
    "kimi": ("chunk_kimi_delta_attention", "value", (), BY_HEAD),
    "nemotron_h": ("mamba2_chunk_scan", "hidden_states", ("D",), BY_HEAD),
    "zamba2": ("mamba2_chunk_scan", "hidden_states", ("D",), BY_HEAD),
    "granite": ("mamba2_chunk_scan", "hidden_states", ("D",), BY_HEAD),
    "jamba": ("mamba_selective_scan", "hidden_states", ("D", "z"), BY_CHANNEL),
    "lfm2": ("causal_conv1d_fn", "hidden_states", (), BY_CHANNEL),
}
KIMI: dict[str, Any] = {
    "linear_head_dim": 8, "linear_num_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_local_experts": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
}  # fmt: skip
LENGTH = 37  # more than a chunk of transformers' functions, and of ours


def opened(name: str) -> hw.HookedModel:
    return hw.load(remembering(built("KimiLinearForCausalLM", **KIMI) if name == "kimi" else hybrid(name)))


def text(rows: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(0))


def first(maps: dict[int, EffectiveMap]) -> EffectiveMap:
    return maps[min(maps)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_map_is_the_slope_of_transformers_own_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(name)
    function, argument, without, axes = FUNCTIONS[name]
    module = model.hf.get_submodule(model.mixers[0].path)
    home = sys.modules[type(module).__module__]
    real = getattr(home, function)
    calls: list[dict[str, Any]] = []

    def spy(*given: Any, **named: Any) -> Any:
        bound = inspect.signature(real).bind(*given, **named)
        calls.append({**bound.arguments, **bound.arguments.pop("kwargs", {})})
        return real(*given, **named)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(home, function, spy)
        model.hf(text())
    found = first(model.mixer_maps(text()))
    arguments: dict[str, Any] = {n: None if n in without else x for n, x in calls[0].items()}
    values: Tensor = arguments[argument]
    values = values.detach().clone().requires_grad_()
    out = real(**{**arguments, argument: values})
    inner = axes(out if isinstance(out, Tensor) else out[0])
    torch.testing.assert_close(found.values, axes(values.detach()))
    rows = torch.tensor([0, 5, LENGTH - 1])
    for row in rows:
        (slope,) = torch.autograd.grad(inner[:, :, row, 0].sum(), values, retain_graph=True)
        expected = axes(slope)[..., 0]
        got = found.map.tile(slice(int(row), int(row) + 1), slice(None))[:, :, 0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    past = found.map.tile(slice(LENGTH - 1, LENGTH), slice(0, LENGTH - 1)).abs().amax()
    assert past > 1e-2 * found.map.dense().abs().amax()  # the last position reads earlier ones
    torch.testing.assert_close(found.output, _output(model, found.path))


def _output(model: hw.HookedModel, path: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.hf.get_submodule(path).register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        model.hf(text())
    handle.remove()
    return seen[0]


def test_linear_attention_of_minimax_is_its_formula() -> None:
    model = opened("minimax")
    found = first(model.mixer_maps(text()))
    module = model.hf.get_submodule(found.path)
    seen: dict[str, Tensor] = {}
    handles = [
        module.qkv_proj.register_forward_hook(lambda _, __, out: seen.update(qkv=out)),  # type: ignore[union-attr]
        module.norm.register_forward_hook(lambda _, given, __: seen.update(inner=given[0])),  # type: ignore[union-attr]
    ]
    with torch.no_grad():
        model.hf(text())
    for handle in handles:
        handle.remove()
    states = module.act_fn(seen["qkv"]).view(1, LENGTH, 4, 24).transpose(1, 2).double()  # type: ignore[operator]
    q, k, _ = states.chunk(3, -1)
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    decay = torch.exp(-module.slope_rate.double() * back)  # type: ignore[union-attr, operator]
    expected = (q @ k.mT * decay).tril()
    torch.testing.assert_close(found.map.dense().double(), expected, rtol=1e-4, atol=1e-6)
    inner = seen["inner"].view(1, LENGTH, 4, 8).transpose(1, 2)
    torch.testing.assert_close(found.inner, inner, rtol=1e-4, atol=1e-5)
    assert (found.kind, found.name, found.layer) == ("linear attention", "MiniMaxLightningAttention", 0)


def test_real_gated_lru_is_its_recurrence() -> None:
    model = opened("recurrent_gemma")
    found = first(model.mixer_maps(text()))
    lru = model.hf.get_submodule(f"{found.path}.rg_lru")
    seen: dict[str, Any] = {}
    handle = lru.register_forward_hook(lambda _, given, out: seen.update(given=given, out=out))
    with torch.no_grad():
        model.hf(text())
    handle.remove()
    x = seen["given"][0][0].double()  # [position, channel]
    gates = [
        torch.sigmoid(torch.einsum("shi,hij->shj", x.view(LENGTH, 4, 8), w.double()) + b.double()).reshape(LENGTH, 32)
        for w, b in (
            (lru.input_gate_weight, lru.input_gate_bias), (lru.recurrent_gate_weight, lru.recurrent_gate_bias)
        )
    ]  # fmt: skip
    decay = torch.exp(-8 * gates[1] * torch.nn.functional.softplus(lru.recurrent_param.double()))  # type: ignore[union-attr]
    decay[0] = 0
    values = x * gates[0] * (1 - decay**2).sqrt()
    expected, passed = (
        torch.zeros(32, LENGTH, LENGTH, dtype=torch.float64),
        torch.ones(32, dtype=torch.float64),
    )
    for j in range(LENGTH - 1, -1, -1):
        expected[:, LENGTH - 1, j] = passed
        passed = passed * decay[j]
    torch.testing.assert_close(found.values[0, :, :, 0].mT.double(), values, rtol=1e-4, atol=1e-5)
    got = found.map.tile(slice(LENGTH - 1, LENGTH), slice(None))[0, :, 0].double()
    torch.testing.assert_close(got, expected[:, -1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.inner[0, :, :, 0].mT, seen["out"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_next", "minimax", "recurrent_gemma", "jamba"])
def test_reading_leaves_the_model_and_transformers_as_they_were(name: str) -> None:
    model = opened(name)
    ids = text(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    home = sys.modules[type(model.hf.get_submodule(model.mixers[0].path)).__module__]
    names, before = dict(vars(home)), model(ids, mask)
    buffers = {n: x.clone() for n, x in model.hf.named_buffers()}
    maps = model.mixer_maps(ids, mask)
    assert list(maps) == [mixer.layer for mixer in model.mixers]
    assert all(not module._forward_hooks and "forward" not in vars(module) for module in model.hf.modules())
    assert all(names[n] is x for n, x in vars(home).items())
    assert all(buffers[n].equal(x) for n, x in model.hf.named_buffers())
    assert model(ids, mask).equal(before)


def test_a_wrong_map_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("nemotron_h")
    right = forms.state_space_by_head

    def wrong(given: Any) -> forms.Form:
        form = right(given)
        assert isinstance(form.map, RecurrenceMap)
        form.map.write[:, 3] *= 1.01
        return form

    monkeypatch.setitem(
        sys.modules["headwater.lens.mixers.kernel_calls"].RECURRENCES, "mamba2_chunk_scan", wrong
    )
    with pytest.raises(
        ModelError, match=r"layer 0 of .*NemotronHMamba2Mixer \(model.layers.0.mixer\).* map differs from"
    ):
        model.mixer_maps(text())


def test_a_layer_whose_output_does_not_follow_from_its_recurrence_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = opened("qwen3_next")
    module = model.hf.get_submodule(model.mixers[0].path)
    module.register_forward_hook(lambda _, __, out: out * 1.001)
    with pytest.raises(ModelError, match="with the map the layer's output differs from its own"):
        model.mixer_maps(text())


def test_a_layer_that_can_not_be_run_again_is_refused_in_one_line() -> None:
    model = opened("qwen3_next")
    module = model.hf.get_submodule(model.mixers[0].path)
    real = module.forward
    cls = type(module)
    module.__class__ = type("Moved", (cls,), {"forward": _elsewhere})
    module.forward = real  # as a library does that moves weights before each run
    with pytest.raises(
        ModelError, match=r"Moved \(.*\) can not be run a second time \(RuntimeError: elsewhere\)"
    ):
        model.mixer_maps(text())


def torch_chunk_gated_delta_rule() -> Tensor:
    raise RuntimeError("elsewhere")


def _elsewhere(self: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
    if hidden_states.is_floating_point():
        raise RuntimeError("elsewhere")
    return torch_chunk_gated_delta_rule()


def test_coarser_dtypes_are_read_within_their_rounding() -> None:
    for name in ("qwen3_next", "zamba2", "jamba"):
        model = hw.load(hybrid(name))
        model.hf.to(torch.bfloat16)
        assert all(found.output.dtype == torch.bfloat16 for found in model.mixer_maps(text()).values())


def test_mixers_of_an_unknown_kind_and_models_without_are_refused() -> None:
    class Shift(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Tensor:
            return self.inner.in_proj(hidden_states.roll(1, 1))[..., :32]  # type: ignore[operator]

    hf = hybrid("lfm2")
    hf.model.layers[0].conv = Shift(hf.model.layers[0].conv)
    model = hw.load(hf)
    with pytest.raises(
        ModelError, match=r"layer 0 of .*: Shift \(model.layers.0.conv\).* does not know how it mixes"
    ):
        model.mixer_maps(text())
    with pytest.raises(ModelError, match=r"every layer of tasks-4l .* is attention"):
        hw.load("tasks-4l").mixer_maps("When Mary")
