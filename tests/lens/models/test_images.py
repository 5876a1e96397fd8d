"""Image towers, pairs of towers, images inside of a text: patch grids, prefix tokens, token groups, edits of one tower.

The inputs of such models are those of `inputs.py` and `signature.py`, their kinds of tokens those of `token_groups.py`.
Seen to fail: an image token counted as text, a prefix token counted as a patch, the grid's columns taken for its rows,
an edit of one tower that reaches the other.
"""

from __future__ import annotations

import copy

import pytest
import torch
from part_oracle import PartOracle

import headwater as hw
from headwater.lens.errors import PromptError, RecordError
from headwater.lens.loading import zoo
from headwater.lens.naming.grids import Grid


def pair(name):
    dense = zoo.build(name)
    return hw.load(copy.deepcopy(dense)), dense


def told(model, given):
    """The same inputs as a call takes them: text first, the rest by name."""
    more = {n: v for n, v in given.items() if n not in ("input_ids", "attention_mask")}
    return (given.get("input_ids"), given.get("attention_mask")), more


@pytest.mark.parametrize("name", ["vit", "clip_vision", "clip", "siglip", "llava"])
def test_recorded_maps_of_every_tower_are_those_of_dense_attention(name):
    model, dense = pair(name)
    given = zoo.inputs(name, lengths=(11, 8)) if name != "vit" else zoo.inputs(name)
    oracle = PartOracle()
    oracle.run(dense, lambda m: m(**given))
    texts, more = told(model, given)
    record = model.record(*texts, **more)
    paths = {module: path for path, module in model.hf.named_modules()}
    for part_name, found in {next(iter(model.parts)): record, **record.parts}.items():
        part = model.part(part_name)
        for layer in part.layers:
            (weights,) = oracle.maps[paths[part.attention_module(layer)]]
            weights = weights * found.valid[:, None, :, None]
            torch.testing.assert_close(found.pattern(layer).double(), weights, atol=2e-6, rtol=1e-4)


def test_an_image_tower_names_its_prefix_and_its_patches():
    model, dense = pair("vit")
    pixels = torch.randn(2, 3, 12, 12)
    assert (model.patches.grid, model.patches.prefix) == ((3, 3), 1)
    record = model.record(pixels, statistics=("mass", "received"), groups=["image", "special"])
    assert record.strings[1] == ["[CLS]", "0,0", "0,1", "0,2", "1,0", "1,1", "1,2", "2,0", "2,1", "2,2"]
    assert record.grids == ((Grid(1, 1, 3, 3, 3),),) * 2
    mass = record.statistic("mass")
    torch.testing.assert_close(
        torch.from_numpy(mass.sel(group="special").values),
        torch.stack([record.pattern(n)[..., 0] for n in (0, 1)], 1),
    )
    assert abs(mass.sum("group") - 1).max() < 1e-5
    with torch.no_grad():
        expected = dense(pixels).last_hidden_state
    torch.testing.assert_close(model.embeddings(pixels), expected, atol=1e-5, rtol=1e-4)
    assert model.record(pixel_values=pixels).map(0).shape == (2, 4, 10, 10)
    with pytest.raises(PromptError, match=r"can not be read: No such file"):
        model.record("a cat")


def test_a_grid_that_is_not_square():
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = hw.load(ViTModel(ViTConfig(**shape, image_size=(8, 16), patch_size=4)))
    record = model.record(torch.randn(1, 3, 8, 16))
    assert model.patches.grid == (2, 4)
    assert record.strings[0][1:] == [f"{row},{column}" for row in range(2) for column in range(4)]


def test_registers_are_prefix_tokens():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
    }
    model = hw.load(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=2)))
    record = model.record(torch.randn(1, 3, 12, 12))
    assert record.strings[0][:4] == ["[CLS]", "[REG1]", "[REG2]", "0,0"]
    assert model.token_groups(model.to_tokens(torch.randn(1, 3, 12, 12)))["special"][0].sum() == 3


def test_an_edit_of_one_tower_leaves_the_other_as_it_is():
    model, _ = pair("clip")
    texts, more = told(model, zoo.inputs("clip"))
    plain = model.record(*texts, **more)
    with model.part("vision").edit(hw.Temperature(0.0)):
        edited = model.record(*texts, **more)
    assert edited.pattern(0).equal(plain.pattern(0))
    torch.testing.assert_close(edited.part("vision").pattern(0), torch.full((2, 4, 10, 10), 0.1))
    assert edited.part("vision").provenance["edits"] == [hw.Temperature(0.0).to_dict()]
    assert edited.provenance["edits"] == []


def test_token_groups_of_a_text_with_an_image():
    model, _ = pair("llava")
    (ids, mask), more = told(model, zoo.inputs("llava", lengths=(11, 8)))
    ids[0, 0], ids[1, -1] = 1, 2  # a beginning of text; an end of text inside of the padding
    tokens = model.to_tokens(ids, mask, **more)
    groups = model.token_groups(tokens, prompt=16)
    assert groups["image"][0].nonzero()[:, 0].tolist() == list(range(2, 11))
    assert groups["special"].nonzero().tolist() == [[0, 0]]
    assert groups["generated"].nonzero().tolist() == [[0, 16], [0, 17], [0, 18], [0, 19], [1, 16]]
    together = torch.stack(list(groups.values())).sum(0)
    assert together.equal(mask), "every real token is in one group, padding in none"
    record = model.record(ids, mask, statistics=("mass",), groups=["image", "text", "special"], **more)
    dense = model.record(ids, mask, **more).pattern(1)
    found = torch.from_numpy(record.statistic("mass").sel(group="image").values)[:, 1]
    torch.testing.assert_close(
        found, dense[..., 2:11].sum(-1) + 0 * found, equal_nan=True, atol=1e-5, rtol=1e-4
    )
    assert list(record.part("vision").groups) == ["image", "special"]
    assert record.grids == ((Grid(2, 1, 3, 3, 3),),) * 2
    with pytest.raises(RecordError, match="nothing says where the prompt ends"):
        model.record(ids, mask, statistics=("mass",), groups=["generated"], **more)
    with pytest.raises(RecordError, match="no token group 'imgae': did you mean 'image'"):
        model.record(ids, mask, statistics=("mass",), groups=["imgae"], **more)


def test_one_image_token_stands_for_all_of_its_patches():
    model, _ = pair("llava")
    (ids, _), more = told(model, zoo.inputs("llava"))
    short = torch.cat([ids[:, :3], ids[:, 11:]], 1)
    assert model(short, **more).equal(model(ids, **more))
    with pytest.raises(PromptError, match=r"2 images take 18 image tokens \(90\) in the text, or one each"):
        model(ids[:, :5], **more)
    assert list(model.record(ids[:, 11:]).parts) == [], "a text without an image has no image tower to record"


def test_a_token_for_an_image_without_an_image_is_refused_everywhere():
    model, _ = pair("llava")
    ids = torch.tensor([[5, zoo.IMAGE_TOKEN, 7, 8]])
    for run in (model, model.record, model.loss, model.to_tokens, model.embeddings, model.run_with_cache):
        with pytest.raises(
            PromptError, match="token 90 at batch 0, position 1 stands for an image, and none is"
        ):
            run(ids)
    with pytest.raises(PromptError, match="give pixel_values=…, or leave the token out"):
        model.generate(ids, 2)
    pixels = torch.randn(1, 3, 12, 12)
    assert model(ids, pixel_values=pixels).shape[1] == 12
    assert model(ids, torch.tensor([[1, 0, 0, 0]])).isfinite().all()  # the marker is padding


def test_image_tokens_are_counted_from_the_picture():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {
        "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 128,
    }  # fmt: skip
    tower = {
        "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 4, "mlp_ratio": 1,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=90, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    dense = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model = hw.load(copy.deepcopy(dense))
    for side in (16, 32):
        pixels, count = torch.randn(1, 3, side, side), (side // 4) ** 2
        ids = torch.tensor([[5, *[90] * count, 7, 8]])
        with torch.no_grad():
            expected = dense(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(model(ids, pixel_values=pixels), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            model([[5, 90, 7, 8]], pixel_values=pixels), expected, atol=1e-5, rtol=1e-4
        )
        record = model.record(ids, pixel_values=pixels)
        assert record.tokens.shape[1] == count + 3
        assert record.part("vision").strings[0][1] == "0,0"
    with pytest.raises(PromptError, match="1 images take 16 image tokens"):
        model([[5, 90, 90, 8]], pixel_values=torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize(("name", "part"), [("clip", "text"), ("siglip", "vision"), ("llava", "vision")])
def test_towers_of_images_are_not_run_without_images(name, part):
    model = hw.load(zoo.build(name)).part(part)
    ids = torch.randint(3, 80, (2, 6), generator=torch.Generator().manual_seed(1))
    for ask in (model.head_outputs, model.record, model.embeddings):
        with pytest.raises(PromptError, match="and no image is given; give pixel_values="):
            ask(ids)


def test_pictures_that_a_tower_does_not_take_are_refused():
    given = zoo.inputs("llava", lengths=(11,))
    pixels = given["pixel_values"]
    llava, vit = hw.load(zoo.build("llava")), hw.load(zoo.build("vit"))
    double = torch.nn.functional.interpolate(pixels, scale_factor=2)
    for wrong, told in (
        (pixels[0], "is one picture without the axis"),
        (pixels[:, :1], "is not of the 3 channels"),
    ):
        for call in (lambda x: llava(given["input_ids"], pixel_values=x), vit.record):
            with pytest.raises(PromptError, match=told):
                call(wrong)
    with pytest.raises(PromptError, match=r"does not take pictures of 24×24 pixels; give pictures of 12×12"):
        llava(given["input_ids"], pixel_values=double)
    with pytest.raises(PromptError, match="takes pictures of one size: Input image size"):
        vit.record(double)


def test_a_model_that_does_not_run_without_pictures_says_so():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "intermediate_size": 32, "image_size": 16, "patch_size": 8},
        qformer_config={**sizes, "intermediate_size": 32, "vocab_size": 97, "encoder_hidden_size": 32},
        text_config={**sizes, "model_type": "opt", "vocab_size": 97, "ffn_dim": 32, "word_embed_proj_dim": 32},
        num_query_tokens=4, image_token_index=96,
    )  # fmt: skip
    model = hw.load(Blip2ForConditionalGeneration(config).eval())
    for call in (
        model,
        model.record,
        model.loss,
        model.generate,
        lambda x: hw.analyses.input_gradient(model, x),
    ):
        with pytest.raises(PromptError, match="does not run without pixel_values; give pixel_values="):
            call([[5, 6, 7]])


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (12, 12)])
def test_pictures_without_a_patch_are_refused(shape: tuple[int, ...]) -> None:
    hf = zoo.build("vit_classifier")
    given = torch.zeros(tuple(hf.config.num_channels if n == 3 else n for n in shape))
    with pytest.raises(PromptError, match="hold no patch"):
        hw.load(hf).record(pixel_values=given)
