"""Tokens that are gone behind a layer: what is kept is what it is where all other tokens can not see the removed ones.

Tests of `prune_tokens.py`, `pruning.py`, `pruning_check.py`, `token_scores.py`, `recycled_tokens.py` and
`shortened_arguments.py`.

Seen to fail: keys of a layer taken at the wrong places, positions numbered anew, a removed token left as a key, the
cache's earlier tokens counted twice, fillers of shorter rows seen, a score of one layer late, the last row at padding.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.attention import context
from headwater.lens.edits.token_scores import patch_entropy, to_remove
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo


def gone(states: torch.Tensor) -> list[list[int]]:
    """The removed positions of each row."""
    return [row.nonzero()[:, 0].tolist() for row in states.isnan().any(-1)]


def hiding(model, removed, layer, first=None):
    """Edits that hide the removed tokens of each row from all layers behind `layer`; `first` counts the padding."""
    later = [n for n in model.layers if n > layer]
    places = [
        [p - (0 if first is None else first[row]) for p in positions] for row, positions in enumerate(removed)
    ]
    return [hw.Knockout("all", keys, layers=later, rows=row) for row, keys in enumerate(places) if keys]


def padded(name):
    """A model, its part and inputs; texts are padded on the left by different lengths."""
    model, given = hw.load(zoo.build(name)), dict(zoo.inputs(name))
    first = None
    if "input_ids" in given and name != "clip_vision":
        ids = given["input_ids"]
        given["input_ids"] = torch.cat([ids[:, :1].expand(-1, 3), ids], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, :3] = 0
        first = [3, 0]
    return model, given, first


TEXT = {"llama": slice(2, 9), "gemma2": slice(1, 8)}


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision", "llava", "llama", "gemma2"])
def test_kept_tokens_are_those_of_a_run_that_hides_the_removed(name):
    model, given, first = padded(name)
    with model.edit(hw.PruneTokens({0: 0.6}, "attention", TEXT.get(name, "image"))):
        found = model.embeddings(**given)
        seen = model.record(**given, keep=("qk", "residual"))
    removed = gone(found)
    assert all(removed)
    plain = model.embeddings(**given)
    with model.edit(*hiding(model, removed, 0, first)):
        expected = model.embeddings(**given)
        hidden = model.record(**given)
    real = given["attention_mask"].bool() if "attention_mask" in given else torch.ones_like(found[..., 0]) > 0
    kept = ~found.isnan().any(-1) & real
    torch.testing.assert_close(found[kept], expected[kept], atol=2e-5, rtol=1e-4)
    assert (plain[kept] - expected[kept]).abs().max() > 1e-3
    assert gone(seen.residual("final")) == removed
    assert not seen.residual(0).isnan().any()
    weights, wanted = (r.pattern(1).movedim(1, 2) for r in (seen, hidden))
    torch.testing.assert_close(weights[kept].float(), wanted[kept].float(), atol=2e-5, rtol=1e-4)
    assert torch.equal(seen.pattern(0), model.record(**given).pattern(0))


@pytest.mark.parametrize("score", ["values", "attention", "flow", "random"])
def test_several_layers_remove_tokens_one_after_the_other(score):
    model = hw.load(deep_vit())
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    with model.edit(hw.PruneTokens({0: 0.7, 2: 11}, score)):
        found = model.embeddings(pixels)
        middle = gone(model.record(pixels, keep="residual").residual(2))
    removed = gone(found)
    assert [(len(a), len(b)) for a, b in zip(middle, removed, strict=True)] == [(10, 25)] * 2
    assert all(set(a) < set(b) for a, b in zip(middle, removed, strict=True))
    with model.edit(*hiding(model, middle, 0), *hiding(model, removed, 2)):
        expected = model.embeddings(pixels)
    kept = ~found.isnan().any(-1)
    torch.testing.assert_close(found[kept], expected[kept], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_a_run_that_is_watched_gives_the_same(name):
    """The short way and the whole way through the attention function agree."""
    model, given, _ = padded(name)
    with model.edit(hw.PruneTokens({0: 3}, "values", TEXT.get(name, "image"))):
        short = model(**given)
        with context.listening(_Listener(model.key)):
            whole = model(**given)
    assert short.isnan().equal(whole.isnan())
    torch.testing.assert_close(short, whole, atol=2e-5, rtol=1e-4, equal_nan=True)


class _Listener:
    statistics = ()

    def __init__(self, model):
        self.model = model

    def take(self, layer, map, value, output):
        assert map.shape[2] == output.shape[2]


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_generation_goes_on_with_a_cache_that_is_shorter_in_later_layers(name):
    model, given, first = padded(name)
    edit = hw.PruneTokens({0: 0.5}, "attention", TEXT.get(name, "image"))
    with model.edit(edit):
        states = model.embeddings(**given)
        found = model.generate(**given, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    removed = gone(states)
    with model.edit(*hiding(model, removed, 0, first)):
        expected = model.generate(**given, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    assert found.sequences.equal(expected.sequences)
    for step, wanted in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, wanted, atol=1e-4, rtol=1e-4)
    whole, *later = [layer.keys.shape[2] for layer in found.past_key_values.layers]
    assert set(later) == {whole - len(removed[0])}


def test_a_recorded_generation_has_the_labels_of_the_whole_text():
    model, given, _ = padded("llava")
    given = {n: x[1:] for n, x in given.items()}
    with model.edit(hw.PruneTokens({0: 2})):
        ids, record = model.generate(**given, max_new_tokens=3, record=True)
        removed = gone(model.embeddings(**given))
    assert record.tokens.equal(ids.cpu())
    with model.edit(*hiding(model, removed, 0)):
        again, expected = model.generate(**given, max_new_tokens=3, record=True)
    assert again.equal(ids)
    rows = [n for n in range(ids.shape[1]) if n not in removed[0]]
    for layer in (0, 1):
        torch.testing.assert_close(
            record.pattern(layer)[:, :, rows], expected.pattern(layer)[:, :, rows], atol=2e-5, rtol=1e-4
        )
    assert not record.pattern(1)[..., removed[0]].any()


def test_image_tokens_whose_patches_the_tower_removed_are_gone_from_the_language_model():
    model, given, first = padded("llava")
    vision = model.part("vision")
    with vision.edit(hw.PruneTokens({0: 0.5}, "flow")):
        found = model(**given)
        made = model.generate(**given, max_new_tokens=3)
        patches = gone(model.record(**given, keep="residual").part("vision").residual("final"))
    images = [row.nonzero()[:, 0].tolist() for row in given["input_ids"] == model.image_token]
    removed = [[images[row][p - 1] for p in places] for row, places in enumerate(patches)]
    assert gone(found) == removed
    places = hiding(model, removed, -1, first)
    with vision.edit(*hiding(vision, patches, 0)), model.edit(*places):
        expected = model(**given)
        assert made.equal(model.generate(**given, max_new_tokens=3))
    kept = ~found.isnan().any(-1) & given["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-4)


def test_rows_keep_different_numbers_of_tokens():
    """A share of the candidates, of which one row has fewer: its places are filled up, and hidden."""
    model, given, _ = padded("llama")
    edit = hw.PruneTokens({0: 0.5}, "values", list(range(2, 14)))
    given = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"].clone()}
    given["attention_mask"][0, :6] = 0
    with model.edit(edit):
        found = model(**given)
    removed = gone(found)
    assert [len(row) for row in removed] == [3, 6], "half of 6 candidates, and half of 12"
    with model.edit(*hiding(model, removed, 0, [6, 0])):
        expected = model(**given)
    kept = ~found.isnan().any(-1) & given["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=2e-5, rtol=1e-4)


def published(hf, pixels, target, last):
    """FlowCut's loop over the layers of a ViT, written after its code: the kept patches and the states."""
    x = hf.embeddings(pixels)
    places = torch.arange(x.shape[1] - 1).expand(len(x), -1)
    cum = None
    for n, layer in enumerate(hf.layers):
        heads = hf.config.num_attention_heads
        h = layer.layernorm_before(x)
        q, k, v = (
            getattr(layer.attention, f"{w}_proj")(h).unflatten(-1, (heads, -1)).transpose(1, 2) for w in "qkv"
        )
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        semantic = (v[:, :, :1] @ v.mT).softmax(-1)[:, :, 0].mean(1)[:, 1:]
        x = layer(x)
        x = x if isinstance(x, torch.Tensor) else x[0]
        if x.shape[1] - 1 <= target:
            continue
        cls = weights[:, :, 0, 1:].mean(1)
        scores = cls / cls.sum(-1, keepdim=True) + semantic / semantic.sum(-1, keepdim=True)
        scores = scores * v.mean(1)[:, 1:].norm(p=1, dim=-1)
        cum = scores if cum is None else 0.5 * cum + 0.5 * scores
        left = last - n
        if left % 2 == 0 and left >= 0:
            p = cls / cls.sum(-1, keepdim=True)
            ratio = -(p * p.log()).sum(-1) / torch.tensor(float(p.shape[-1])).log()
            cut = int(((p.shape[-1] - target) / left**0.5 * (1 - ratio**2)).max().round()) if left else 10**6
            count = max(p.shape[-1] - cut, target)
            keep = cum.topk(count, dim=1).indices.sort(1).values
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))], 1)
            cum, places = cum.gather(1, keep), places.gather(1, keep)
    return places, hf.layernorm(x)


def deep_vit():
    torch.manual_seed(0)
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24}
    hf = ViTModel(ViTConfig(image_size=24, patch_size=4, **sizes), add_pooling_layer=False).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() == 2:
                weight.mul_(8.0)
    return hf


def test_flowcut_is_the_loop_of_its_code():
    hf = deep_vit()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        places, expected = published(hf, pixels, 9, 3)
    model = hw.load(hf)
    with model.edit(hw.PruneTokens({3: 9}, "flow", adaptive=True)):
        found = model.embeddings(pixels)
    kept = ~found.isnan().any(-1)
    assert kept.sum(-1).tolist() == [10, 10]
    for row in range(2):
        assert (kept[row].nonzero()[1:, 0] - 1).equal(places[row])
        torch.testing.assert_close(found[row, kept[row]], expected[row], atol=1e-4, rtol=1e-4)


def test_as_many_go_as_the_code_of_flowcut_says():
    attending = torch.rand(3, 40, generator=torch.Generator().manual_seed(5)) ** 6
    among = torch.ones(3, 40) > 0
    for left, target in ((1, 5), (2, 9), (6, 20)):
        p = attending / attending.sum(-1, keepdim=True)
        ratio = -(p * p.log()).sum(-1) / torch.log(torch.tensor(40.0))
        expected = int(((40 - target) / left**0.5 * (1 - ratio**2)).max().round())
        assert expected > 1
        assert to_remove(attending, among, left, torch.tensor([target] * 3)).tolist() == [expected] * 3


def test_removed_tokens_are_recycled_as_means_by_similarity():
    model = hw.load(zoo.build("vit"))
    pixels = zoo.inputs("vit")["pixel_values"][:1]
    plain = model.record(pixels, keep="residual").residual(1)[0]
    scores = torch.tensor([9.0, 1, 2, 8, 3, 4, 7, 5, 6])[: plain.shape[0] - 1]
    with model.edit(hw.PruneTokens({0: 2}, scores, recycle=2)):
        found = model.record(pixels, keep="residual").residual(1)[0]
    order = (scores.argsort(descending=True) + 1).tolist()
    anchors, others = order[2:4], order[4:]
    unit = plain / plain.norm(dim=-1, keepdim=True)
    groups = {anchor: [(1.0, plain[anchor])] for anchor in anchors}
    for other in others:
        likeness = [max(float(unit[other] @ unit[a]), 0.0) for a in anchors]
        best = max(range(2), key=likeness.__getitem__)
        groups[anchors[best]].append((likeness[best], plain[other]))
    for anchor, members in groups.items():
        mean = sum(w * x for w, x in members) / sum(w for w, _ in members)
        torch.testing.assert_close(found[anchor], mean, atol=1e-5, rtol=1e-4)
    assert found.isnan().any(-1).nonzero()[:, 0].tolist() == sorted(others)


def test_a_prior_is_mixed_in_as_shares():
    model = hw.load(zoo.build("vit"))
    pixels = zoo.inputs("vit")["pixel_values"][:1]
    prior = patch_entropy(pixels, (4, 4))[0]
    record = model.record(pixels)
    row = record.pattern(0)[0, :, 0, 1:].mean(0)
    mixed = 0.3 * row / row.sum() + 0.7 * prior / prior.sum()
    with model.edit(hw.PruneTokens({0: 4}, prior=prior, mix=0.7)):
        removed = gone(model.embeddings(pixels))[0]
    kept = sorted((mixed.argsort(descending=True)[:4] + 1).tolist())
    assert sorted(set(range(1, 10)) - set(removed)) == kept


def test_everything_kept_changes_nothing_and_numbers_are_exact():
    model = hw.load(zoo.build("vit"))
    pixels = zoo.inputs("vit")["pixel_values"]
    with model.edit(hw.PruneTokens({0: 1.0})):
        assert model.embeddings(pixels).equal(model.embeddings(pixels))
    plain = model.embeddings(pixels)
    with model.edit(hw.PruneTokens({0: 9})):
        assert model.embeddings(pixels).equal(plain)
    edit = hw.PruneTokens({0: 4, 1: 0.2}, "random", seed=3, recycle=1)
    assert hw.edit_from_dict(edit.to_dict()) == edit


REFUSED = {
    "last layer": (lambda: hw.PruneTokens({2: 3}, positions=[1]), "is the last"),
    "share": (lambda: hw.PruneTokens({0: 1.5}, positions=[1]), "share from 0.0 to 1.0"),
    "score": (lambda: hw.PruneTokens({0: 3}, "flwo", [1]), "flow"),
    "no image": (lambda: hw.PruneTokens({0: 3}), "has no image tokens"),
    "empty": (lambda: hw.PruneTokens({}, positions=[1]), "what is left behind a layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_is_refused(name):
    make, told = REFUSED[name]
    model = hw.load(tiny_models.tiny("llama"))
    with pytest.raises(EditError, match=told), model.edit(make()):
        pass


def test_a_cache_filled_without_it_and_a_head_over_all_patches_are_refused():
    model, given, _ = padded("llama")
    cache = model.hf(**given, use_cache=True).past_key_values
    edit = model.edit(hw.PruneTokens({0: 3}, positions=slice(1, 6)))
    with edit, pytest.raises(EditError, match="filled without it"):
        model.hf(given["input_ids"][:, -1:], past_key_values=cache)
    siglip = hw.load(zoo.build("siglip"))
    vision = siglip.part("vision")
    with vision.edit(hw.PruneTokens({0: 3})), pytest.raises(EditError, match="made of all patches"):
        siglip(**zoo.inputs("siglip"))


@pytest.mark.parametrize(("name", "told"), [
    ("qwen3_next", "no attention"), ("bloom", "place|alibi|not known|do not run"), ("t5", "read its tokens"),
    ("dinov3", "by their number|do not run"),
])  # fmt: skip
def test_models_whose_layers_place_tokens_otherwise_are_refused(name, told):
    model = hw.load(zoo.build(name))
    with pytest.raises(EditError, match=told), model.edit(hw.PruneTokens({0: 3}, positions=[1, 2])):
        pass


def test_a_tower_whose_patches_are_merged_into_image_tokens_is_refused():
    tower = hw.load(zoo.build("smolvlm")).part("vision")
    with pytest.raises(EditError, match="several patches"), tower.edit(hw.PruneTokens({0: 3})):
        pass


def test_gradients_reach_what_is_kept_and_not_what_is_gone():
    model = hw.load(tiny_models.tiny("llama"))
    ids = torch.arange(3, 14)[None]
    vectors = model.hf.get_input_embeddings()(ids).detach().requires_grad_()
    with model.edit(hw.PruneTokens({0: 3}, "values", slice(1, 9))):
        found = model.embeddings(inputs_embeds=vectors, grad=True)
    removed = gone(found.detach())
    assert len(removed[0]) == 5
    (found[0, -1] * torch.linspace(-1, 1, 32)).sum().backward()
    assert vectors.grad.isfinite().all()
    with model.edit(*hiding(model, removed, 0)):
        other = vectors.detach().requires_grad_()
        (model.embeddings(inputs_embeds=other, grad=True)[0, -1] * torch.linspace(-1, 1, 32)).sum().backward()
    torch.testing.assert_close(vectors.grad, other.grad, atol=1e-4, rtol=1e-3)


def test_a_run_that_failed_leaves_nothing_for_the_next() -> None:
    model = hw.load(zoo.build("bloom"))  # its later layers do not run on fewer tokens
    given = zoo.inputs("bloom")
    before = model.record(**given, keep=("qk", "residual")).residual(model.layers[1])
    with pytest.raises(EditError, match="no token of"), model.edit(hw.PruneTokens({0: 2}, positions=[0, 1])):
        model(**given)
    after = model.record(**given, keep=("qk", "residual")).residual(model.layers[1])
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"keep": {"all": 3}}, "names each layer by its number"),
        ({"keep": {(0, 1): 3}}, "names each layer by its number"),
        ({"keep": {True: 3}}, "names each layer by its number"),
        ({"keep": {1: 3, "1": 5}}, "names layer 1 twice"),
        ({"keep": {1: 3}, "prior": -torch.rand(16)}, "give numbers of 0 or more"),
        ({"keep": {1: 3}, "score": -torch.rand(16), "prior": torch.rand(16)}, "give numbers of 0 or more"),
    ],
)
def test_settings_that_say_nothing_sure_are_refused(settings, why):
    with pytest.raises(EditError, match=why), hw.load("vit-digits").edit(hw.PruneTokens(**settings)):
        pass


def test_two_of_them_on_one_part_are_refused():
    model, pixels = hw.load("vit-digits"), torch.zeros(1, 1, 8, 8)
    both = hw.PruneTokens({0: 8}), hw.PruneTokens({1: 4})
    with model.edit(*both), pytest.raises(EditError, match="name all layers in one"):
        model(pixels)
    with model.edit(both[0]), model.edit(both[1]), pytest.raises(EditError, match="name all layers in one"):
        model(pixels)
