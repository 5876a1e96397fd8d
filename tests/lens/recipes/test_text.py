"""Recipes against the formulas they state, and the models they refuse.

Seen to fail: ACT with its first sink kept in, VAR without its condition, VHD without outlier removal.
"""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from comparison import close_run
from dense_oracle import Oracle, run

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.recipes import paint
from headwater.lens.running.forward import forward


def test_attention_calibration_is_the_papers_formula():
    """ACT on layer 1 written out on the dense map, sinks detected by its own loop over the unedited map."""
    for name in ("gpt2", "llama"):
        ids, _ = tiny_models.batch(1, (17, 17))
        plain = Oracle()
        run(tiny_models.tiny(name), ids, None, plain)
        alpha = 1.7
        count = 0

        def calibrated(layer, w, plain=plain, alpha=alpha):
            nonlocal count
            if layer != 1:
                return w
            new, n = w.clone(), w.shape[-1]
            for b in range(len(w)):
                for h in (0, 2):
                    a = plain.maps[1][b, h]
                    sinks = [j for j in range(n) if float(a[:, j].sum()) / (n - j) > alpha / n][1:]
                    count += len(sinks)
                    for i in range(n):
                        base = w[b, h, i].clone()
                        base[sinks] = 0
                        free = w[b, h, i, sinks].sum() * 0.6
                        new[b, h, i, sinks] *= 0.4
                        if base.sum() > 0:
                            new[b, h, i] += free * base / base.sum()
                        else:
                            new[b, h, i] = w[b, h, i]
            return new

        expected = run(tiny_models.tiny(name), ids, None, Oracle(weights=calibrated))
        model = hw.load(tiny_models.tiny(name))
        with model.edit(*hw.recipes.attention_calibration(model, ["1.0", "1.2"], alpha=alpha, layers=[1])):
            close_run(model(ids), expected, 3e-4)
            record = model.record(ids)
            torch.testing.assert_close(record.pattern(1).sum(-1), torch.ones(2, 4, 17))
        assert count > 4, "there must be sinks to calm"
        assert not model(ids).equal(expected.to(torch.float32))


def test_the_sinks_of_an_edit_are_those_of_the_analysis():
    model = hw.load(tiny_models.tiny("llama"))
    ids, mask = tiny_models.batch(2, (17, 11))
    found = hw.analyses.find_sinks(model.record(ids, mask), rule="act", alpha=2.0)["sink"].values
    from headwater.lens.records.sinks import find

    ours = find(model.record(ids, mask, statistics=("received", "visible"), keep=()), "sinks:act:2")
    assert torch.from_numpy(found).equal(ours)
    assert ours.any()


def test_calibration_heads_are_those_that_do_not_lower_the_measure():
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(3, (17, 17))
    kept = hw.recipes.calibration_heads(model, ids, alpha=2.0, layers=[1, 2])
    plain = float(model.loss(ids).mean())
    for layer in (1, 2):
        for head in range(4):
            with model.edit(hw.Redistribute("sinks:act:2", 0.4, heads=[f"{layer}.{head}"])):
                better = float(model.loss(ids).mean()) <= plain
            assert (hw.Head(layer, head) in kept) == better
    assert 0 < len(kept) < 8


def test_calibration_heads_without_sinks_stay_and_take_no_run():
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(2)
    measured = []

    def measure(logits, tokens):
        measured.append(1)
        return logits.new_full((len(logits),), -float(len(measured)))  # each run is worse than the one before

    assert len(hw.recipes.calibration_heads(model, ids, measure, alpha=1e6, layers=[1])) == model.n_heads
    assert len(measured) == 1
    assert hw.recipes.calibration_heads(model, ids, measure, alpha=0.5, layers=[1]) == []


def test_calibration_leaves_first_and_last_layers_alone():
    deep = hw.load(tiny_models.tiny("gpt2"))
    with pytest.raises(EditError, match="leaves the first two layers and the last alone"):
        hw.recipes.attention_calibration(deep)


def test_visual_redistribution_is_the_papers_formula():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64)).eval()  # fmt: skip
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(30)
        hf.get_input_embeddings().weight[[1, 5], 3] = 400.0
        for key, weight in hf.named_parameters():
            if "q_proj" in key or "k_proj" in key:
                weight.mul_(12)
    ids = torch.tensor([[1, 20, 21, 5, 23, 24, 25, 40, 41, 42, 43]])
    image, p, rho, least, tau = range(1, 7), 0.6, 0.3, 0.35, 4.0
    model = hw.load(hf)
    assert hw.recipes.massive_dimensions(model, ids, tau=tau) == [3]
    edits = hw.recipes.visual_redistribution(model, ids, rho=rho, least=least, tau=tau, image=image)
    assert [edit.layers for edit in edits] == [2, 3]
    states = forward(model, model.to_tokens(ids), output_hidden_states=True).hidden_states
    acted = 0

    def redistributed(layer, w):
        nonlocal acted
        x = states[layer][0]
        sinks = [
            j for j in range(11) if abs(float(x[j, 3])) / float((x[j].square().mean() + 1e-6).sqrt()) > tau
        ]
        visual, others = [j for j in sinks if j in image], [j for j in image if j not in sinks]
        if layer not in (2, 3) or not visual:
            return w
        new = w.clone()
        for h in range(4):
            for i in range(7, 11):
                a = w[0, h, i]
                inside = a[list(image)].sum()
                if a[visual].sum() / (inside + 1e-6) <= rho and inside >= least and a[others].sum() > 0:
                    acted += 1
                    new[0, h, i, sinks] = p * a[sinks]
                    new[0, h, i, others] += (1 - p) * a[sinks].sum() * a[others] / a[others].sum()
        return new

    expected = run(copy.deepcopy(hf), ids, None, Oracle(weights=redistributed))
    assert 0 < acted < 32, acted
    with model.edit(*edits):
        close_run(model(ids), expected, 3e-4)


def test_models_without_images_are_refused_by_name():
    model = hw.load(tiny_models.tiny("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    for recipe in (hw.recipes.visual_redistribution, hw.recipes.visual_emphasis):
        with pytest.raises(EditError, match="LlamaForCausalLM has no image tokens"):
            recipe(model, ids)
    with pytest.raises(EditError, match="has no image tokens, so it has no group 'image'"):
        model.edit(*hw.recipes.block_groups("image", "generated"))
    with pytest.raises(EditError, match="no massive activation"):
        hw.recipes.massive_dimensions(model, ids)
    with pytest.raises(EditError, match="GPT2LMHeadModel can not be read so"):
        hw.recipes.order_free(hw.load(tiny_models.tiny("gpt2")), [[0, 2], [2, 4]])


def test_emphasised_tokens_are_the_quarter_and_the_outliers():
    first, last = torch.arange(12.0), torch.tensor([1.0] * 8 + [1.1, 9.0, 8.0, 1.2])
    local, summary = paint.emphasised_tokens(first, last)
    assert sorted(local) == [9, 10, 11]
    assert summary == []  # 9 and 10 are outliers, and local ones
    local, summary = paint.emphasised_tokens(first.flip(0), last)
    assert (sorted(local), sorted(summary)) == ([0, 1, 2], [9, 10])


def selected(seen, blind, remove=True):
    """VHD written out for one prompt: the heads whose output differs most, outliers taken out."""
    one, two = Oracle(), Oracle()
    run(tiny_models.tiny("llama"), seen, None, one)
    run(tiny_models.tiny("llama"), blind, None, two)
    found = {}
    for layer in (0, 1, 2):
        a, b = one.z[layer][0, :, -1], two.z[layer][0, :, -1]
        vhd, size = (a - b).norm(dim=-1), b.square().sum(-1)
        out = (vhd > vhd.mean() + vhd.std(unbiased=False)) & (size > size.mean() + size.std(unbiased=False))
        vhd = torch.where(out & remove, 0.0, vhd)
        ordered = vhd.sort().values
        found |= {f"{layer}.{h}": 2.0 for h in range(4) if vhd[h] > (ordered[1] + ordered[2]) / 2}
    return found


def test_head_reinforcement_is_the_papers_selection():
    model = hw.load(tiny_models.tiny("llama"))
    removed = 0
    for seed in range(12):
        seen, _ = tiny_models.batch(seed, (6,))
        blind = seen[:, 3:]
        expected = selected(seen, blind)
        removed += expected != selected(seen, blind, remove=False)
        (edit,) = hw.recipes.head_reinforcement(model, seen, blind, layers="all")
        assert edit == hw.ScaleHeads(expected)
    assert removed > 0, "an outlier must have been taken out for this to mean anything"
    (short,) = hw.recipes.head_reinforcement(model, seen, blind)
    assert {h[0] for h in short.factors} == {"1", "2"}


def test_recipes_of_masks_and_patterns_say_what_they_mean():
    model = hw.load(tiny_models.tiny("gpt2"))
    ids, _ = tiny_models.batch(6, (12,))
    q, k = torch.arange(12)[:, None], torch.arange(12)[None]
    grouped = {
        "shifted": (hw.recipes.shifted_groups(model, 4), lambda h: (q + 2 * (h >= 2)) // 4 == (k + 2 * (h >= 2)) // 4),
        "fixed": (hw.recipes.sink_fixed_groups(model, 4, sinks=2), lambda h: (
            (q + 2 * (h >= 3)) // 4 == (k + 2 * (h >= 3)) // 4) | (k < 2) | (q < 2)),
        "streaming": (hw.recipes.streaming(1, 3), lambda h: (k < 1) | (q - k < 3)),
    }  # fmt: skip
    for edits, seen in grouped.values():

        def masked(layer, s, seen=seen):
            return torch.stack([s[:, h].masked_fill(~seen(h), -torch.inf) for h in range(4)], 1)

        with model.edit(*edits):
            close_run(model(ids), run(tiny_models.tiny("gpt2"), ids, None, Oracle(scores=masked)), 3e-4)
        model = hw.load(tiny_models.tiny("gpt2"))
    with model.edit(*hw.recipes.force_attention(["1.2"], [3, 5])):
        row = model.record(ids).pattern(1, 2)[0]
    assert row[-1].tolist() == [0.5 if j in (3, 5) else 0.0 for j in range(12)]
    with model.edit(*hw.recipes.force_attention(["1.2"], [3, 5], amount=0.0)):
        close_run(model.record(ids).pattern(1, 2)[0, -2], row[-2], 3e-4)


def test_soft_perturbation_heavy_hitters_and_off_by_one_are_their_edits():
    assert hw.recipes.soft_perturbation(["1.1"], 0.5) == [hw.TowardIdentity(0.5, heads=["1.1"])]
    assert hw.recipes.heavy_hitters(4, 8) == [hw.HeavyHitters(4, 8)]
    assert hw.recipes.off_by_one() == [hw.Normaliser("softmax1")]
    plain, other = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert hw.recipes.guided(plain, other, 3.0).tolist() == [4.0, -4.0]
    assert hw.recipes.guided(plain, other, 0.0).equal(plain)


def test_order_free_reading_is_a_recipe():
    model = hw.load(tiny_models.tiny("llama"))
    (edit,) = hw.recipes.order_free(model, [[1, 3], [3, 6]])
    one, two = torch.tensor([[4, 5, 6, 7, 8, 9, 10]]), torch.tensor([[4, 7, 8, 9, 5, 6, 10]])
    with model.edit(edit):
        first = model(one)[0, -1]
    with model.edit(*hw.recipes.order_free(model, [[1, 4], [4, 6]])):
        close_run(model(two)[0, -1], first, 3e-4)
