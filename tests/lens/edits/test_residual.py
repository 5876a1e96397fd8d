"""Residual and MLP edits against a plain reading of the blocks, and order-free documents against their permutations.

Seen to fail: the direction not normalised, positions counted from the padding.
"""

from __future__ import annotations

import contextvars
import threading

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.edits import residual
from headwater.lens.errors import EditError
from headwater.lens.examples.sample_pictures import sample_pictures
from headwater.lens.models import blocks

D = 32
V = torch.linspace(-2, 3, D)
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers", "mistral": "model.layers", "gemma2": "model.layers",
          "gptoss": "model.layers"}  # fmt: skip


def streams(hf, name, ids, mask=None):
    """Residual streams by (layer, place) of the untouched model, from hidden states and the attention's output."""
    found, handles = {}, []
    for layer, block in enumerate(hf.get_submodule(LAYERS[name])):
        after = (
            block.post_attention_layernorm
            if name == "gemma2"
            else block.attn
            if name == "gpt2"
            else block.self_attn
        )

        def note(place, layer=layer):
            def see(module, given, out):
                found[layer, place] = out[0] if isinstance(out, tuple) else out

            return see

        handles.append(block.register_forward_pre_hook(
            lambda m, given, named, layer=layer: found.update(
                {(layer, "pre"): given[0] if given else named["hidden_states"]}),
            with_kwargs=True))  # fmt: skip
        handles += [after.register_forward_hook(note("attention")), block.register_forward_hook(note("post"))]
    with torch.no_grad():
        hf(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in range(tiny_models.LAYERS):
        found[layer, "mid"] = found[layer, "pre"] + found[layer, "attention"]
    return found


def changed(x, how):
    unit = V / V.norm()
    made = {"add": x + V, "replace": V.expand_as(x), "project_out": x - (x @ unit)[..., None] * unit}
    return (made | {"scale": V * x})[how]


@pytest.fixture(scope="module", params=tiny_models.CAUSAL)
def model(request):
    return request.param, hw.load(tiny_models.tiny(request.param))


@pytest.mark.parametrize("how", ["add", "replace", "project_out", "scale"])
@pytest.mark.parametrize("place", ["pre", "mid", "post"])
def test_the_stream_is_what_the_edit_makes_it(model, place, how):
    name, hooked = model
    ids, _ = tiny_models.batch(1, (9, 9))
    plain = streams(hooked.hf, name, ids)[1, place]
    want = plain.clone()
    want[:, 3] = changed(plain, how)[:, 3]
    with hooked.edit(hw.EditResidual(1, how, V, place=place, positions=[3])):
        got = streams(hooked.hf, name, ids)
    if place == "pre":
        torch.testing.assert_close(got[1, "post"], after_layer_0(hooked, name, ids, how))
    if place == "mid":
        torch.testing.assert_close(got[1, "mid"], want, atol=1e-4, rtol=1e-4)
    following = got[2, "pre"]
    if place == "post":
        torch.testing.assert_close(following, want, atol=1e-5, rtol=1e-5)
    assert (following[:, 3:] - streams(hooked.hf, name, ids)[2, "pre"][:, 3:]).abs().max() > 1e-3


def after_layer_0(hooked, name, ids, how):
    """The same edit of what enters layer 1, made as an edit of what leaves layer 0."""
    with hooked.edit(hw.EditResidual(0, how, V, place="post", positions=[3])):
        return streams(hooked.hf, name, ids)[1, "post"]


@pytest.mark.parametrize("how", ["add", "replace", "project_out", "scale"])
def test_what_the_mlp_adds_is_edited(model, how):
    name, hooked = model
    ids, _ = tiny_models.batch(1, (9,))
    plain = streams(hooked.hf, name, ids)
    adds = plain[1, "post"] - plain[1, "mid"]
    with hooked.edit(hw.EditMLP(1, how, V)):
        got = streams(hooked.hf, name, ids)
    torch.testing.assert_close(got[1, "post"], plain[1, "mid"] + changed(adds, how), atol=2e-4, rtol=1e-4)


def test_positions_hold_with_padding_and_a_cache(model):
    _, hooked = model
    ids, _ = tiny_models.batch(4, (10, 10))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    steps = torch.linspace(-1, 1, 3 * D).reshape(3, D)
    edits = [hw.EditResidual(1, "add", 3 * V, positions=[2, 5]), hw.EditMLP(0, "add", 2 * steps),
             hw.EditResidual(2, "project_out", V, place="mid", positions=-1)]  # fmt: skip
    with hooked.edit(*edits):
        found = hooked.generate(ids, 4, attention_mask=mask)
        alone = hooked.generate(ids[:1, 4:], 4)
        torch.testing.assert_close(hooked(ids, mask)[0, 4:], hooked(ids[:1, 4:])[0], atol=1e-4, rtol=1e-4)
        step = ids[:1, 4:]
        for _ in range(alone.shape[1] - step.shape[1]):
            step = torch.cat([step, hooked(step)[:, -1].argmax(-1, keepdim=True)], -1)
    ends = alone.shape[1] - 6
    assert found[0, 10 : 10 + ends].equal(alone[0, 6:])
    assert alone[0, 6 : 6 + 1].equal(step[0, 6:7])


def test_nothing_is_left_and_no_other_thread_sees_it(model):
    _, hooked = model
    ids, _ = tiny_models.batch(5, (8,))
    plain, seen = hooked(ids), []
    with hooked.edit(hw.EditResidual(0, "add", 5 * V), hw.Knockout(-1, "token:#3", rows=[])):
        assert not hooked.hf(ids, use_cache=False).logits.equal(plain)
        other = threading.Thread(target=lambda: seen.append(hooked(ids)))
        other.start()
        other.join()
    assert seen[0].equal(plain)
    assert hooked(ids).equal(plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hooked.hf.modules())


def test_what_is_read_of_an_edited_run_is_edited(model):
    """Whether the model was read before or not, and although the functions at norms try the norms on other vectors."""
    _, hooked = model
    ids, _ = tiny_models.batch(6, (8,))
    plain = hooked.record(ids, keep=("residual",)).residual(1)
    with hooked.edit(hw.EditResidual(1, "scale", 2.0)):
        assert hooked.record(ids, keep=("residual",)).residual(1).equal(2 * plain)
    with hooked.edit(hw.EditResidual(1, "replace", V, place="mid")):
        logits = hooked(ids)
        torch.testing.assert_close(hooked.run_with_cache(ids)[0], logits, atol=2e-4, rtol=1e-4)


def test_scaling_by_one_number_and_by_one(model):
    name, hooked = model
    ids, _ = tiny_models.batch(1, (9,))
    plain = streams(hooked.hf, name, ids)
    with hooked.edit(hw.EditMLP(1, "scale", 0.25)):
        got = streams(hooked.hf, name, ids)
    want = plain[1, "mid"] + 0.25 * (plain[1, "post"] - plain[1, "mid"])
    torch.testing.assert_close(got[1, "post"], want, atol=2e-4, rtol=1e-4)
    logits = hooked(ids)
    with hooked.edit(hw.EditMLP(1, "scale", 1), hw.EditResidual(1, "scale", torch.ones(D))):
        assert hooked(ids).equal(logits)


WRONG = [
    (lambda: hw.EditResidual(9, "add", V), "layer 9"),
    (lambda: hw.EditResidual(1, "twist", V), "'project_out' or 'scale'"),
    (lambda: hw.EditResidual(1, "add", V[:5]), "vector must be 32 finite numbers"),
    (lambda: hw.EditResidual(1, "add", V * torch.inf), "NaN or infinite"),
    (lambda: hw.EditResidual(1, "project_out", 0 * V), "one direction"),
    (lambda: hw.EditResidual(1, "add", V, place="between"), "'pre', 'mid' or 'post'"),
    (lambda: hw.EditMLP(1, "add", V, positions="sinks:act"), "sinks belong to heads"),
    (lambda: hw.PositionInvariant([[0, 3]]), "two or more documents"),
    (lambda: hw.PositionInvariant([[0, 3], [4, 6]]), "right behind the other"),
    (lambda: hw.PositionInvariant("docs"), "pairs"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_a_wrong_edit_is_one_line(make, message):
    llama = hw.load(tiny_models.tiny("llama"))
    with pytest.raises(hw.HeadwaterError, match=message) as caught:
        llama.edit(make())
    assert "\n" not in str(caught.value)


def test_post_norm_blocks_have_no_middle_and_no_mlp_of_their_own():
    bert = hw.load(tiny_models.tiny("bert"))
    for edit in (hw.EditResidual(1, "add", V, place="mid"), hw.EditMLP(1, "add", V)):
        with pytest.raises(EditError, match="BertLayer"):
            bert.edit(edit)
    ids, mask = tiny_models.batch(6)
    with bert.edit(hw.EditResidual(1, "add", V, positions=[2])):
        assert (
            bert.embeddings(ids, mask)[1, :11]
            - hw.load(tiny_models.tiny("bert")).embeddings(ids, mask)[1, :11]
        ).abs().max() > 0.1


def test_what_a_block_adds_up_to_is_not_read_from_another_threads_run(monkeypatch):
    """While a block is tried on three tokens, another context runs the same model."""
    plain = tiny_models.tiny("gpt2")
    model, ids = hw.load(plain), tiny_models.batch(1)[0]
    run, close, lengths = plain.forward, torch.allclose, []

    def both(*given, **named):
        out = run(*given, **named)
        contextvars.Context().run(lambda: run(ids))
        return out

    def noted(a, b, **how):
        lengths.append(a.shape[1])
        return close(a, b, **how)

    monkeypatch.setattr(model.hf, "forward", both)
    monkeypatch.setattr(torch, "allclose", noted)
    assert residual._facts(model, blocks.block(model, 1)) == residual._Facts(True, True)
    assert set(lengths) == {3}


@pytest.mark.parametrize(("name", "part", "mlp"), [
    ("clip-digits", "text", "text_model.encoder.layers.1.mlp"),
    ("clip-digits", "vision", "vision_model.encoder.layers.1.mlp"),
    ("vlm-digits", "vision", "model.vision_tower.encoder.layers.1.mlp"),
])  # fmt: skip
def test_the_mlp_of_a_tower_is_edited(name, part, mlp):
    """Whether an MLP adds to the stream is seen on the inputs that the model reads, a text and a picture."""
    model = hw.load(name)
    tower = model.part(part)
    sample = next(iter(sample_pictures(name).values()))
    given = hw.Example(text=sample.text, image=sample.image)
    change = torch.linspace(-1, 1, tower.d_model)
    handle = model.hf.get_submodule(mlp).register_forward_hook(lambda module, given, out: out + change)
    expected = model(given)
    handle.remove()
    with tower.edit(hw.EditMLP(1, "add", change)):
        torch.testing.assert_close(model(given), expected)
    assert not torch.allclose(model(given), expected)
