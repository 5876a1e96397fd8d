"""Names of activations without TransformerLens: against what transformers itself gives out, and by their definitions.

Runs with such names are made by `face.py` and `run.py`. Seen to fail when: what functions at `hook_pattern` give does
not reach the values; a hook stays on a module after its run; another thread's run calls this thread's functions; the
mask is not lifted for a pair that a function made visible; functions get the model's own tensor; ids taken from tokens
still carry the mask.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from bridged import varied
from torch import Tensor

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo
from headwater.lens.model import HookedModel

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "gpt_neox", "gpt_oss", "opt", "phi3", "qwen3", "gemma3")
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))


def opened(name: str) -> tuple[HookedModel, torch.nn.Module]:
    """The model under Headwater, and an eager copy that Headwater never saw."""
    plain = varied(name)
    return hw.load(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("name", [*FAMILIES, "bert", "modernbert", "clip_text"])
def test_stream_and_patterns_are_those_of_transformers(name: str) -> None:
    model, plain = opened(name)
    with torch.no_grad():
        expected = plain(IDS, output_hidden_states=True, output_attentions=True)
    output, cache = model.run_with_cache(IDS, return_cache_object=False, return_type=None)
    assert output is None
    for layer in model.layers:
        close = {"atol": 2e-5, "rtol": 1e-4}
        stream, pattern = expected.hidden_states[layer], expected.attentions[layer]
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_pre"], stream, **close)
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"], pattern, **close)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_what_adds_up(name: str) -> None:
    """k and v per key–value head; z through W_O and b_O is the attention's output; the parts make up the stream."""
    model, _ = opened(name)
    _, cache = model.run_with_cache(
        IDS, return_cache_object=False, names_filter=lambda name: True, return_type=None
    )
    heads, groups, wide = model.n_heads, model.n_kv_heads, model.d_head
    for layer in model.layers:
        found = {
            n.removeprefix(f"blocks.{layer}."): t
            for n, t in cache.items()
            if n.startswith(f"blocks.{layer}.")
        }
        assert found["attn.hook_q"].shape == found["attn.hook_z"].shape == (2, 9, heads, wide)
        assert found["attn.hook_k"].shape == found["attn.hook_v"].shape == (2, 9, groups, wide)
        assert found["attn.hook_pattern"].shape == found["attn.hook_attn_scores"].shape == (2, heads, 9, 9)
        weights = model.weights(layer)
        result = torch.einsum("bshe,hed->bshd", found["attn.hook_z"], weights.W_O)
        torch.testing.assert_close(found["attn.hook_result"], result, atol=1e-5, rtol=1e-4)
        if not name.startswith("gemma"):  # there a norm stands between the heads' sum and the stream
            torch.testing.assert_close(
                found["hook_attn_out"], result.sum(2) + weights.b_O, atol=1e-5, rtol=1e-4
            )
        values = found["attn.hook_v"].repeat_interleave(heads // groups, 2)
        z = torch.einsum("bhqk,bkhe->bqhe", found["attn.hook_pattern"], values)
        torch.testing.assert_close(found["attn.hook_z"], z, atol=1e-5, rtol=1e-4)
        after = found["hook_resid_pre"] + found["hook_attn_out"] + found["hook_mlp_out"]
        torch.testing.assert_close(found["hook_resid_post"], after, atol=2e-5, rtol=1e-4)
        parallel = "hook_resid_mid" not in found
        assert parallel == (name == "gpt_neox")


def test_names_that_do_not_add_up_are_not_offered() -> None:
    """BERT normalises behind the sum: what its attention gives is not what is added to the stream."""
    model, _ = opened("bert")
    assert not any(
        name.endswith(("hook_attn_out", "hook_resid_mid", "hook_mlp_out")) for name in model.hook_names()
    )
    with pytest.raises(ModelError, match=r"no activation 'blocks\.0\.hook_attn_out': did you mean"):
        model.run_with_cache(IDS, names_filter="blocks.0.hook_attn_out")


def dense(
    model: HookedModel, plain: torch.nn.Module, layer: int, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits of the untouched model when one layer's attention is changed pattern @ values, written out."""
    _, cache = model.run_with_cache(IDS, return_cache_object=False)
    pattern, values = cache[f"blocks.{layer}.attn.hook_pattern"], cache[f"blocks.{layer}.attn.hook_v"]
    group = model.n_heads // model.n_kv_heads
    z = torch.einsum("bhqk,bkhe->bqhe", change(pattern), values.repeat_interleave(group, 2)).flatten(2)
    weights = model.weights(layer)
    out = z @ weights.W_O.flatten(0, 1) + weights.b_O
    path = next(n for n, m in model.hf.named_modules() if m is model.attention_module(layer))
    handle = plain.get_submodule(path).register_forward_hook(lambda m, a, o: (out, *o[1:]))
    with torch.no_grad():
        logits = plain(IDS).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_changed_pattern_is_what_the_values_get(name: str) -> None:
    model, plain = opened(name)

    def change(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 1] = torch.eye(9)  # rows need not be what a softmax could give
        pattern[:, 2, 4:] *= 0.5
        return pattern

    expected = dense(model, plain, 1, change)
    hooks = [("blocks.1.attn.hook_pattern", lambda tensor, hook: change(tensor))]
    torch.testing.assert_close(model.run_with_hooks(IDS, fwd_hooks=hooks), expected, atol=2e-5, rtol=1e-4)
    assert (expected - model(IDS)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_changed_scores_pass_through_the_softmax(name: str) -> None:
    """A pair hidden by the mask may be shown, and one that is seen hidden; a learned sink keeps its part."""
    model, plain = opened(name)

    def scores(tensor: Tensor, hook: object) -> Tensor:
        tensor[:, 1, 2, 5] = 1.5  # written into what came, as TransformerLens' own setters do
        tensor[:, 0, 4, 1] = -torch.inf
        return tensor * 0.7

    _, cache = model.run_with_cache(IDS, return_cache_object=False)
    given = cache["blocks.1.attn.hook_attn_scores"].clone()
    given[:, 1, 2, 5], given[:, 0, 4, 1] = 1.5, -torch.inf
    given = (given * 0.7).masked_fill(given < -1e30, -torch.inf)
    sinks = getattr(model.attention_module(1), "sinks", None)
    if sinks is not None:
        given = torch.cat([given, sinks.detach()[None, :, None, None].expand(2, -1, 9, 1)], -1)
    expected = dense(model, plain, 1, lambda _: given.softmax(-1)[..., :9])
    hooks = [("blocks.1.attn.hook_attn_scores", scores)]
    torch.testing.assert_close(model.run_with_hooks(IDS, fwd_hooks=hooks), expected, atol=2e-5, rtol=1e-4)


def test_functions_get_their_own_tensor_and_a_point() -> None:
    model, _ = opened("llama")
    before = model(IDS)
    seen = {}

    def spoil(tensor: Tensor, hook: object) -> None:
        seen[hook.name] = hook.layer()  # type: ignore[attr-defined]
        tensor.zero_()

    zeroed = model.run_with_hooks(IDS, fwd_hooks=[(lambda name: name.endswith("hook_z"), spoil)])
    assert seen == {"blocks.0.attn.hook_z": 0, "blocks.1.attn.hook_z": 1}
    with model.edit(hw.AblateHeads("all")):
        torch.testing.assert_close(zeroed, model(IDS))
    # what is written into a pattern counts, though the model itself has none
    inside = model.run_with_hooks(IDS, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), spoil)])
    torch.testing.assert_close(inside, zeroed)
    torch.testing.assert_close(model(IDS), before, atol=0, rtol=0)
    with pytest.raises(
        ModelError, match=r"hook_z gave \[2, 9\]; it must give a tensor \[2, 9, 4, 8\] or None"
    ):
        model.run_with_hooks(
            IDS, fwd_hooks=[("blocks.0.attn.hook_z", lambda tensor, hook: tensor[:, :, 0, 0])]
        )


def test_patterns_are_built_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = opened("llama")
    from headwater.kernels.maps.attention_map import AttentionMap

    built = []
    real = AttentionMap.dense
    monkeypatch.setattr(AttentionMap, "dense", lambda map, heads=None: built.append(1) or real(map, heads))
    names = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_post", "blocks.1.attn.hook_rot_k"]
    model.run_with_cache(IDS, return_cache_object=False, names_filter=names)
    assert built == []
    _, cache = model.run_with_cache(IDS, return_cache_object=False, names_filter="blocks.1.attn.hook_pattern")
    assert (len(built), list(cache)) == (1, ["blocks.1.attn.hook_pattern"])


def test_runs_meet_edits() -> None:
    """Patterns and z are those of the edited model."""
    model, _ = opened("llama")
    with model.edit(hw.Knockout(queries=[5], keys=[0], heads="0.2"), hw.ScaleHeads({"1.1": 0.5})):
        _, cache = model.run_with_cache(IDS, return_cache_object=False)
        expected = model.head_outputs(IDS)
    assert cache["blocks.0.attn.hook_pattern"][:, 2, 5, 0].abs().max() == 0
    for layer in model.layers:
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_z"], expected[:, layer].transpose(1, 2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_they_give_alone(side: str) -> None:
    model, _ = opened("gpt2")
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((9, 5)):
        where = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = IDS[row, :length], 1
    _, cache = model.run_with_cache(ids, attention_mask=mask, return_cache_object=False)
    _, alone = model.run_with_cache(IDS[1:, :5], return_cache_object=False)
    where = slice(4, 9) if side == "left" else slice(0, 5)
    for name in ("blocks.1.attn.hook_z", "blocks.1.hook_resid_post", "ln_final.hook_normalized"):
        torch.testing.assert_close(cache[name][1:, where], alone[name], atol=1e-5, rtol=1e-4)
    pattern = cache["blocks.1.attn.hook_pattern"][1:, :, where, where]
    torch.testing.assert_close(pattern, alone["blocks.1.attn.hook_pattern"], atol=1e-5, rtol=1e-4)


def test_gradients_flow_when_asked_for() -> None:
    """`incl_bwd` keeps what autograd gives for the same loss; a function behind gets the same gradient."""
    model, plain = opened("llama")
    names = ["blocks.1.attn.hook_pattern", "blocks.0.attn.hook_z", "blocks.1.hook_resid_pre"]
    loss, cache = model.run_with_cache(IDS, names_filter=names, incl_bwd=True, return_cache_object=False)
    got = {}
    model.run_with_hooks(
        IDS,
        bwd_hooks=[(n, lambda grad, hook: got.update({hook.name: grad})) for n in names],
        return_type="loss",
    ).backward()
    hidden = {}

    def keep(module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden["in"] = args[0].detach().requires_grad_()
        return (hidden["in"], *args[1:])

    plain.model.layers[1].register_forward_pre_hook(keep)  # type: ignore[union-attr,index,operator]
    logits = plain(IDS).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache["blocks.1.hook_resid_pre_grad"], hidden["in"].grad, atol=1e-6, rtol=1e-3)
    for name in names:
        torch.testing.assert_close(cache[f"{name}_grad"], got[name], atol=1e-7, rtol=1e-4)
    assert not model.run_with_cache(IDS, return_cache_object=False)[0].requires_grad


def test_nothing_outlives_a_run() -> None:
    model, _ = opened("llama")

    def fail(tensor: Tensor, hook: object) -> None:
        raise ZeroDivisionError

    for name in ("blocks.0.attn.hook_q", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_pre"):
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(IDS, fwd_hooks=[(name, fail)])
    model.run_with_cache(IDS, stop_at_layer=1, return_cache_object=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(IDS), model(IDS), atol=0, rtol=0)


def test_threads_do_not_meet() -> None:
    """One thread runs plainly while the other zeroes heads, on the same model, many times."""
    model, _ = opened("llama")
    plain, name = model(IDS), "blocks.0.attn.hook_v"
    zeroed = model.run_with_hooks(IDS, fwd_hooks=[(name, lambda tensor, hook: tensor * 0)])
    wrong: list[str] = []

    def run(kind: str, expected: Tensor, work: Callable[[], Tensor]) -> None:
        for _ in range(25):
            if not torch.equal(work(), expected):
                wrong.append(kind)

    threads = [
        threading.Thread(target=run, args=("plain", plain, lambda: model(IDS))),
        threading.Thread(
            target=run,
            args=(
                "zeroed", zeroed,
                lambda: model.run_with_hooks(IDS, fwd_hooks=[(name, lambda tensor, hook: tensor * 0)]),
            ),
        ),
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_run_begun_inside_of_a_function_does_not_call_it_again() -> None:
    model, _ = opened("llama")
    name, inner = "blocks.1.hook_resid_pre", []

    def function(stream: Tensor, hook: object) -> None:
        inner.append(model.run_with_hooks(IDS, fwd_hooks=[(name, lambda stream, hook: stream * 2)]))

    assert model.run_with_hooks(IDS, fwd_hooks=[(name, function)]).equal(model(IDS))
    assert len(inner) == 1
    assert not inner[0].equal(model(IDS))


def test_options_of_a_cache() -> None:
    model, _ = opened("gpt2")
    _, whole = model.run_with_cache(IDS[:1], return_cache_object=False)
    _, last = model.run_with_cache(IDS[:1], return_cache_object=False, pos_slice=-1)
    torch.testing.assert_close(last["blocks.1.hook_resid_post"], whole["blocks.1.hook_resid_post"][:, -1:])
    torch.testing.assert_close(
        last["blocks.1.attn.hook_pattern"], whole["blocks.1.attn.hook_pattern"][:, :, -1:]
    )
    _, single = model.run_with_cache(IDS[:1], return_cache_object=False, remove_batch_dim=True)
    torch.testing.assert_close(single["blocks.0.attn.hook_z"], whole["blocks.0.attn.hook_z"][0])
    stream, early = model.run_with_cache(IDS[:1], return_cache_object=False, stop_at_layer=-1)
    torch.testing.assert_close(stream, whole["blocks.1.hook_resid_pre"])
    assert not any(name.startswith(("blocks.1", "ln_final")) for name in early)
    logits, loss = model.run_with_hooks(IDS, return_type="both")
    torch.testing.assert_close(loss, model.loss(IDS).mean())
    torch.testing.assert_close(logits, model(IDS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.run_with_cache(IDS, names_filter="blocks.0.attn.hook_patern"), "did you mean"),
        (
            lambda m: m.run_with_hooks(IDS, fwd_hooks=[("blocks.7.attn.hook_z", print)]),
            "no activation 'blocks.7",
        ),
        (lambda m: m.run_with_hooks(IDS, return_type="tokens"), "return_type is 'logits'"),
        (lambda m: m.run_with_hooks(IDS, start_at_layer=1), "start_at_layer is an option of TransformerLens"),
        (
            lambda m: m.run_with_cache(IDS, remove_batch_dim=True, return_cache_object=False),
            "for one prompt; got 2",
        ),
    ],
)
def test_refusals(call: Callable[[HookedModel], object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        call(opened("gpt2")[0])
    assert "\n" not in str(caught.value)


def test_models_without_these_names_are_refused() -> None:
    model = hw.load(zoo.build("gptj"))
    with pytest.raises(ModelError, match="TransformerLens' names"):
        model.run_with_cache(IDS, return_cache_object=False)


@pytest.mark.parametrize(
    ("name", "part"), [("vit", "vision"), ("t5", "encoder"), ("t5", "decoder"), ("t5", "cross")]
)
def test_the_names_of_a_part_add_up(name: str, part: str) -> None:
    model = hw.load(zoo.build(name)).part(part)
    assert "hook_embed" not in model.hook_names()
    tokens = model.to_tokens(**zoo.inputs(name))
    _, cache = model.run_with_cache(tokens, return_cache_object=False, return_type=None)
    for layer in model.layers:
        start = f"blocks.{layer}.hook_"
        others = [cache[f"{start}other_attn_out"]] if part in ("decoder", "cross") else []
        assert cache[f"{start}attn_out"].abs().max() > 1e-3
        middle = sum(others, cache[f"{start}resid_pre"] + cache[f"{start}attn_out"])
        torch.testing.assert_close(middle, cache[f"{start}resid_mid"])
        torch.testing.assert_close(middle + cache[f"{start}mlp_out"], cache[f"{start}resid_post"])


def test_tokens_are_a_tensor_that_keeps_its_mask() -> None:
    model, _ = opened("gpt2")
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    tokens = model.to_tokens(IDS, mask)
    assert isinstance(tokens, Tensor)
    assert type(tokens[:, 1:]) is type(tokens.ids) is type(torch.cat([tokens, tokens])) is Tensor
    for copied in (copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert torch.equal(copied.ids, tokens.ids)
        assert torch.equal(copied.mask, mask.bool())
    _, cache = model.run_with_cache(tokens, return_cache_object=False)
    assert cache["blocks.0.attn.hook_pattern"][1, :, 5, 6:].abs().max() == 0
