"""Every edit against its dense float64 meaning on six architectures: alone, combined, neutral, and with a cache.

Seen to fail: gain taken after scaling, knockout without renormalising, tau as a divisor, gate on the wrong head, freed
mass shared equally instead of in proportion.
"""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from dense_oracle import Oracle, run

import headwater as hw
from headwater.lens.errors import EditError, HeadError

LENGTHS = (17, 11)


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=1e-4, equal_nan=True)


def redistribute(w, keys, keep, to=None):
    new = w.clone()
    others = [j for j in range(w.shape[-1]) if j not in keys] if to is None else to
    freed = (1 - keep) * w[..., keys].sum(-1)
    target = w[..., others].sum(-1)
    ok = target > 1e-12
    share = w[..., others] / target.clamp_min(1e-30)[..., None]
    new[..., keys] = torch.where(ok[..., None], keep * w[..., keys], w[..., keys])
    new[..., others] = torch.where(ok[..., None], w[..., others] + freed[..., None] * share, w[..., others])
    return new


def on_heads(tensor, heads, change):
    new = tensor.clone()
    for h in heads:
        new[:, h] = change(tensor)[:, h]
    return new


def at(layer_heads, change):
    """A closure for the oracle: `change` on the given heads of the given layers."""
    return lambda layer, x: on_heads(x, layer_heads.get(layer, []), change)


def knock(queries, keys):
    def change(s):
        s = s.clone()
        for q in queries:
            s[:, :, q, keys] = -torch.inf
        return s

    return change


ALL = {layer: [0, 1, 2, 3] for layer in range(3)}
EDITS = {
    "scale": (lambda: [hw.ScaleHeads({"1.2": 0.0, "0.1": 2.5})],
              Oracle(outputs=lambda n, z: at({0: [1]}, lambda x: 2.5 * x)(n, at({1: [2]}, lambda x: 0 * x)(n, z)))),
    "zero": (lambda: [hw.AblateHeads(["0.0", "2.3"])], Oracle(outputs=at({0: [0], 2: [3]}, lambda z: 0 * z))),
    "knockout": (lambda: [hw.Knockout([5, 6], [0, 2, 3], heads=["1.0", "1.1"])],
                 Oracle(scores=at({1: [0, 1]}, knock([5, 6], [0, 2, 3])))),
    "knockout everything": (lambda: [hw.Knockout([5], "all", layers=1)],
                            Oracle(scores=at({1: [0, 1, 2, 3]}, knock([5], slice(None))))),
    "redistribute": (lambda: [hw.Redistribute([0], 0.4)], Oracle(weights=at(ALL, lambda w: redistribute(w, [0], 0.4)))),
    "redistribute to": (lambda: [hw.Redistribute([0, 1], 0.0, to=[3, 4], heads="2.1")],
                        Oracle(weights=at({2: [1]}, lambda w: redistribute(w, [0, 1], 0.0, [3, 4])))),
    "identity": (lambda: [hw.TowardIdentity(0.3, layers=[0, 2])],
                 Oracle(weights=at({0: [0, 1, 2, 3], 2: [0, 1, 2, 3]}, lambda w: 0.7 * w + 0.3 * torch.eye(17)))),
    "temperature": (lambda: [hw.Temperature(0.5, heads=["0.2", "1.3"])],
                    Oracle(scores=at({0: [2], 1: [3]}, lambda s: 0.5 * s))),
    "combined": (
        lambda: [hw.TowardIdentity(0.2), hw.Redistribute([0], 0.5), hw.Temperature(2.0), hw.Knockout([7], [1]),
                 hw.ScaleHeads({"1.1": 3.0})],
        Oracle(
            scores=at(ALL, lambda s: knock([7], [1])(2 * s)),
            weights=at(ALL, lambda w: redistribute(0.8 * w + 0.2 * torch.eye(17), [0], 0.5)),
            outputs=at({1: [1]}, lambda z: 3 * z),
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=tiny_models.ALL)
def model(request):
    return request.param, hw.load(tiny_models.tiny(request.param))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_its_dense_meaning(model, name):
    architecture, hooked = model
    ids, mask = tiny_models.batch(1, LENGTHS)
    make, oracle = EDITS[name]
    expected = run(tiny_models.tiny(architecture), ids, mask, oracle)
    plain = hooked(ids, mask)
    with hooked.edit(*make()):
        logits = hooked(ids, mask)
        record = hooked.record(ids, mask)
    valid = mask.bool()
    close(logits[valid], expected[valid], 2e-4)
    assert (logits[valid] - plain[valid]).abs().max() > 1e-4, "an edit that changes nothing tests nothing"
    for layer in record.layers:
        close(record.pattern(layer), oracle.maps[layer] * mask[:, None, :, None], 3e-5)
        received = torch.from_numpy(record.statistic("received").sel(layer=layer).values.copy())
        close(received, (oracle.maps[layer] * mask[:, None, :, None]).sum(-2), 2e-4)
    assert hooked(ids, mask).equal(plain), "nothing of the edit is left behind"


NEUTRAL = [
    hw.ScaleHeads({"0.0": 1.0, "2.1": 1}),
    hw.Redistribute([0], keep=1.0),
    hw.Redistribute([], keep=0.2),
    hw.TowardIdentity(0.0),
    hw.Temperature(1.0),
    hw.Knockout([], [0]),
    hw.AblateHeads([]),
]


@pytest.mark.parametrize("edit", NEUTRAL, ids=lambda e: e.to_python())
def test_a_neutral_edit_is_exact(model, edit):
    _, hooked = model
    ids, mask = tiny_models.batch(2)
    plain = hooked(ids, mask)
    with hooked.edit(edit):
        assert hooked(ids, mask).equal(plain)
    with hooked.edit(*NEUTRAL):
        assert hooked(ids, mask).equal(plain)


@pytest.mark.parametrize("architecture", tiny_models.CAUSAL)
def test_edits_hold_at_decode_time(architecture):
    """Greedy text with a cache equals picking the arg-max from edited full forward passes, one token at a time."""
    model = hw.load(tiny_models.tiny(architecture))
    ids, _ = tiny_models.batch(5, (9,))
    edits = [
        hw.Redistribute([0, 1], 0.2),
        hw.ScaleHeads({"1.1": 0.0}),
        hw.TowardIdentity(0.4, layers=2),
        hw.Temperature(0.7),
    ]
    edits.append(hw.Knockout("all", [3], heads=["0.2", "0.3"]))
    with model.edit(*edits):
        found = model.generate(ids, 10)
        step = ids
        for _ in range(10):
            step = torch.cat([step, model(step)[:, -1].argmax(-1, keepdim=True)], -1)
            if (step[:, -1] == model.hf.generation_config.eos_token_id).all():
                break
    assert found.equal(step)
    assert not found.equal(model.generate(ids, 10)), "the edits must matter for this to mean anything"


def test_left_padded_rows_are_edited_at_their_own_positions():
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(6)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with model.edit(hw.Redistribute([0], 0.1), hw.Knockout([-1], [2])):
        close(model(ids, mask)[1, 6:], model(ids[1:, 6:])[0])
        generated = model.generate(ids, 6, attention_mask=mask)
        assert generated[1, 6:].equal(model.generate(ids[1:, 6:], 6)[0])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_mean_and_resample_ablation_take_their_values_from_the_examples(architecture):
    model = hw.load(tiny_models.tiny(architecture))
    ids, mask = tiny_models.batch(7)
    examples, lengths = tiny_models.batch(8, (17, 9))
    source = Oracle()
    run(tiny_models.tiny(architecture), examples, lengths, source)
    real = lengths.bool()
    mean = source.z[1].transpose(1, 2)[real].mean(0)[2]  # head 2 of layer 1 over the real positions

    def to_mean(layer, z):
        z = z.clone()
        if layer == 1:
            z[:, 2] = mean
        return z

    expected = run(tiny_models.tiny(architecture), ids, mask, Oracle(outputs=to_mean))
    from headwater.lens.naming.tokens import Tokens

    with model.edit(hw.AblateHeads("1.2", how="mean", examples=Tokens(examples, real))):
        close(model(ids, mask)[mask.bool()], expected[mask.bool()], 2e-4)

    def to_sample(layer, z):
        z = z.clone()
        if layer == 1:
            z[:, 2] = source.z[1][:1, 2]  # the only example that is long enough
        return z

    expected = run(tiny_models.tiny(architecture), ids, mask, Oracle(outputs=to_sample))
    with model.edit(hw.AblateHeads("1.2", how="resample", examples=Tokens(examples, real))):
        close(model(ids, mask)[mask.bool()], expected[mask.bool()], 2e-4)


def test_edits_on_disjoint_heads_commute():
    model = hw.load(tiny_models.tiny("gemma2"))
    ids, mask = tiny_models.batch(9)
    a, b = hw.Redistribute([0], 0.3, heads=["0.1", "1.1"]), hw.TowardIdentity(0.5, heads=["0.2", "1.3"])
    with model.edit(a, b):
        one = model(ids, mask)
    with model.edit(b, a):
        other = model(ids, mask)
    assert one.equal(other)
    with model.edit(a), model.edit(b):
        assert model(ids, mask).equal(one), "nested blocks add up"


def test_all_backends_give_the_same_edited_logits():
    model = hw.load(tiny_models.tiny("llama"))
    ids, mask = tiny_models.batch(10)
    with model.edit(hw.Redistribute([0], 0.3), hw.TowardIdentity(0.2)):
        with model.using("blocked"):
            blocked = model(ids, mask)
        with model.using("reference"):
            close(model(ids, mask)[mask.bool()], blocked[mask.bool()])
        with model.using("flash"):
            close(model(ids, mask)[mask.bool()], blocked[mask.bool()])


SERIAL = [
    hw.ScaleHeads({"2.3": 0.0}),
    hw.AblateHeads(["1.0", "1.1"], how="mean", examples=["a b", "c"]),
    hw.Knockout(-1, slice(0, 4), heads="0.1", layers="all"),
    hw.Redistribute(keys=[0], keep=0.25, to=[3, -1], layers=[1, 2]),
    hw.TowardIdentity(0.5),
    hw.Temperature(2.0, heads=["0.0"]),
]


@pytest.mark.parametrize("edit", SERIAL, ids=lambda e: type(e).__name__)
def test_an_edit_survives_json_and_python(edit):
    read = hw.edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert read == edit
    assert eval(edit.to_python(), {"hw": hw}) == edit


WRONG = [
    (
        lambda: hw.ScaleHeads({"9.0": 0.0, "1.7": 0.0}),
        HeadError,
        "no such head: 9.0, 1.7; the model has layers 0 to 2",
    ),
    (lambda: hw.ScaleHeads({"2-3": 0.0}), HeadError, "written 'layer.head'"),
    (lambda: hw.ScaleHeads({"1.1": float("nan")}), EditError, "finite number; got nan"),
    (lambda: hw.ScaleHeads([("1.1", 0)]), EditError, "takes a mapping"),
    (lambda: hw.Redistribute([0], keep=-0.5), EditError, "keep must be between 0 and 1"),
    (lambda: hw.Redistribute([0], to="all"), EditError, "'others' or positions"),
    (lambda: hw.Redistribute([0, 1], to=[1, 2]), EditError, "positions \\[1\\] are both"),
    (lambda: hw.Redistribute("sinks"), EditError, "got 'sinks'"),
    (lambda: hw.Redistribute([0.5]), EditError, "whole numbers"),
    (lambda: hw.TowardIdentity(1.5), EditError, "between 0 and 1; got 1.5"),
    (lambda: hw.Temperature("hot"), EditError, "got 'hot'"),
    (lambda: hw.Knockout([0], [1], layers=7), HeadError, "no attention in layer 7"),
    (lambda: hw.AblateHeads("1.1", how="median"), EditError, "'zero', 'mean' or 'resample'"),
    (lambda: hw.AblateHeads("1.1", how="mean"), EditError, "needs examples="),
    (lambda: "ScaleHeads", EditError, "model.edit takes edits"),
]


@pytest.mark.parametrize(("make", "kind", "message"), WRONG)
def test_a_wrong_edit_is_refused_in_one_line(make, kind, message):
    model = hw.load(tiny_models.tiny("gpt2"))
    with pytest.raises(kind, match=message) as caught:
        model.edit(make())
    assert "\n" not in str(caught.value)


def test_a_position_beyond_the_prompt_is_refused():
    model = hw.load(tiny_models.tiny("gpt2"))
    with model.edit(hw.Redistribute([9])):
        with pytest.raises(EditError, match="no position 9 in a prompt of 4 tokens"):
            model(torch.tensor([[5, 6, 7, 8]]))
        model.generate(torch.tensor([[5, 6, 7, 8]]), 8)  # there the position comes later


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"edit": "ScaleHead", "factors": {}}, "did you mean 'ScaleHeads'"),
        ({"edit": "Temperature"}, "needs tau"),
        ({"edit": "Temperature", "tau": 1, "hads": "all"}, "did you mean 'heads'"),
        ([], "an edit is an object"),
        ({"tau": 1}, "an edit is an object"),
    ],
)
def test_a_malformed_edit_file_is_refused(data, message):
    with pytest.raises(EditError, match=message):
        hw.edit_from_dict(data)
