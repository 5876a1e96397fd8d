"""Modules of diffusers (`samples.py`, `picture.py`, `opening.py`): outputs as before, parts and axes, maps by hand."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import tiny_diffusers
from torch import nn

import headwater as hw
from headwater.lens.attention.module_hooks import on

MADE = ["unet", "dit", "pixart", "sd3", "flux", "autoencoder"]
PARTS = {
    "unet": {
        "self:4x4": "image", "self:8x8": "image", "cross:4x4": "image × words", "cross:8x8": "image × words",
    },
    "dit": {"self": "image"},
    "pixart": {"self": "image", "cross": "image × words"},
    "sd3": {"joint": "image and words"},
    "flux": {"joint": "words and image"},
    "autoencoder": {"self": "image"},
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_outputs_are_those_of_the_module_and_parts_have_names(name):
    module = getattr(tiny_diffusers, name)()
    model = hw.load(module)
    args, kwargs = model.hf.arguments.filled(given := dict(model.hf.arguments.tensors))
    with torch.no_grad():
        assert torch.equal(module(*args, **kwargs)[0], model(given)[0])
    convolves = name in ("unet", "autoencoder")
    assert model.unread == (("ResnetBlock2D (convolutions)",) if convolves else ())
    found = {
        part: f"{each.queries} × {each.keys}" if each.crosses else each.queries
        for part, each in model.parts.items()
    }
    assert found == PARTS[name]


def heads_of(projected, heads):
    return projected.double().unflatten(-1, (heads, -1)).transpose(1, 2)


def projections(module, run):
    """What every linear layer and normalisation of attention gave, by path."""
    seen, paths = {}, {each: path for path, each in module.named_modules() if ".attn" in path}
    with on(list(paths), after=lambda each, args, kwargs, out: seen.update({paths[each]: out})):
        run()
    return seen


@pytest.mark.parametrize("name", ["unet", "pixart", "sd3"])
def test_maps_are_the_softmax_of_the_projections_by_hand(name):
    module = getattr(tiny_diffusers, name)()
    model = hw.load(module)
    found = []
    seen = projections(module, lambda: found.append(model.record(dict(model.hf.arguments.tensors))))
    (record,) = found
    for part_name, part in model.parts.items():
        own = record if part_name == model.part_name else record.part(part_name)
        for site, layer in part.modules.items():
            path, heads = site.key.path, part.shapes[layer].heads
            q, k = (heads_of(seen[f"{path}.to_{each}"], heads) for each in "qk")
            if part_name == "joint":
                q, k = (
                    torch.cat([each, heads_of(seen[f"{path}.add_{letter}_proj"], heads)], 2)
                    for each, letter in ((q, "q"), (k, "k"))
                )
            expected = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).float()
            torch.testing.assert_close(own.map(layer).dense(), expected)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_words_stand_where_the_module_takes_them_out_again(name):
    module = getattr(tiny_diffusers, name)()
    model = hw.load(module)
    given = dict(model.hf.arguments.tensors)
    path = "transformer_blocks.0.attn"
    taken = {}

    def see(which, args, kwargs):
        taken["image" if which is image else "words"] = args[0]

    attention = module.get_submodule(path)
    image, words = attention.to_out[0], attention.to_add_out
    z = model.head_outputs(given)[:, 0].transpose(1, 2).flatten(2)
    with on([image, words], before=see):
        model(given)
    strings = model.record(given).strings[0]
    for kind, expected in taken.items():
        places = [n for n, text in enumerate(strings) if text.startswith("word") == (kind == "words")]
        torch.testing.assert_close(z[:, places], expected)


def test_grids_follow_the_size_of_the_picture():
    model = hw.load(tiny_diffusers.unet())
    given = {"sample": torch.randn(1, 4, 8, 16), "timestep": torch.tensor([5])}
    record = model.record({**given, "encoder_hidden_states": torch.randn(1, 5, 16)})
    fine = record.part("cross:8x8")
    assert fine.strings[0][-1] == "7,15"
    assert record.strings[0][-1] == "3,7"
    assert fine.keys.strings[0] == [f"word {n}" for n in range(5)]
    assert fine.statistic("entropy").coords["query_column"].max() == 15


def test_analyses_of_records_and_gradients_run_on_parts():
    model = hw.load(tiny_diffusers.unet())
    given = dict(model.hf.arguments.tensors)

    def loss(out, tokens):
        return out.square().mean((1, 2, 3))

    cross = model.part("cross:8x8")
    found = hw.analyses.head_importance(cross, given, loss=loss)
    gates = torch.ones(1, cross.n_layers, cross.n_heads, requires_grad=True)
    with cross.gated(gates):
        one = [loss(model(model.to_tokens(given).rows([n]), grad=True).sample, None) for n in range(2)]
    expected = sum(torch.autograd.grad(each.sum(), gates)[0][0].abs() for each in one) / 2
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    raw = hw.analyses.raw_attention(model.record(given).part("cross:8x8"))
    assert {"query", "key"} <= set(raw.dims)
    with pytest.raises(hw.HeadwaterError, match="distance"):
        model.record(given).part("cross:8x8").statistic("distance")


@pytest.mark.parametrize(("name", "words"), [("sd3", slice(16, 23)), ("flux", slice(0, 7))])
def test_words_and_picture_of_joint_attention_are_groups(name, words):
    model = hw.load(getattr(tiny_diffusers, name)())
    record = model.record(dict(model.hf.arguments.tensors), groups=["words", "image"], statistics=("mass",))
    expected = record.map(1).dense()[..., words].sum(-1)
    mass = torch.tensor(record.statistic("mass").sel(layer=1).values)
    torch.testing.assert_close(mass[:, :, 0], expected)
    torch.testing.assert_close(mass.sum(2), torch.ones_like(expected))


def test_a_module_of_lower_precision_opens_by_its_configuration():
    module = tiny_diffusers.unet().to(torch.bfloat16)
    model = hw.load(module)
    assert model.hf.arguments.tensors["sample"].dtype == torch.bfloat16
    assert model.hf.arguments.tensors["timestep"].dtype == torch.long


def test_a_module_that_says_too_little_asks_for_a_sample():
    from diffusers.models.embeddings import Timesteps

    class Silent(Timesteps):
        pass

    with pytest.raises(hw.HeadwaterError, match=r"give hw\.load\(module, sample="):
        hw.load(Silent(8, True, 0))
    assert isinstance(Silent(8, True, 0), nn.Module)
