"""Which patch each token of a picture in a text is, held to the model's own placement.

The oracle changes one square of the picture and looks which of the text model's input embeddings move. The tower's
attention is silenced, so that a patch stays where it is. Seen to fail: rows and columns exchanged, a class token
counted as a patch, the second picture given the places of the first, queries of a resampler put on a grid.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import headwater as hw
from headwater.lens.loading import zoo
from headwater.lens.naming.grids import places

TEXT = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4,
}  # fmt: skip
IMAGE = 90


def llava(strategy: str) -> Any:
    tower = hf.CLIPVisionConfig(**TOWER, image_size=12, projection_dim=16)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=tower, text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1,
            vision_feature_select_strategy=strategy,
        )
    )  # fmt: skip


def internvl() -> Any:
    tower = hf.InternVLVisionConfig(**{**TOWER, "patch_size": [4, 4]}, image_size=[16, 16])
    text = hf.Qwen2Config(**TEXT)
    config = hf.InternVLConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
    return hf.InternVLForConditionalGeneration(config)


def silent(tower: nn.Module) -> None:
    """Attention of the tower writes nothing."""

    def nothing(module: nn.Module, args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    for module in tower.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(nothing)


def entering(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The embeddings that enter the text model."""
    found: list[Tensor] = []
    stack = model.model.language_model
    hook = stack.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(**given)
    return found[0]


CASES = {
    "llava": (lambda: llava("default"), 12, 4, 9),
    "llava, class token too": (lambda: llava("full"), 12, 4, 10),
    "paligemma": (lambda: zoo.build("paligemma"), 12, 4, 9),
    "internvl, shuffled 2 × 2": (internvl, 16, 8, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_two_pictures_in_a_text(name: str) -> None:
    build, side, square, count = CASES[name]
    torch.manual_seed(0)
    plain = build().eval()
    model = hw.load(plain)
    picture = [IMAGE] * count
    rows = [[5, *picture, 6, *picture, 7], [5, 6, *picture, 8, *picture]]  # two pictures in each text
    given = {"input_ids": torch.tensor(rows), "pixel_values": torch.randn(4, 3, side, side)}
    record = model.record(given["input_ids"], pixel_values=given["pixel_values"])
    silent(plain.model.vision_tower)
    before = entering(plain, given)
    across = side // square
    wanted = torch.full((2, len(rows[0]), 4), -1)
    for number in range(4):
        for row in range(across):
            for column in range(across):
                changed = given["pixel_values"].clone()
                changed[
                    number, :, row * square : (row + 1) * square, column * square : (column + 1) * square
                ] += 1
                moved = (entering(plain, given | {"pixel_values": changed}) - before).abs().amax(-1)
                ((text, token),) = (moved > 1e-6).nonzero().tolist()
                wanted[text, token] = torch.tensor([number % 2, 0, row, column])
    assert places(record.grids, *record.tokens.shape).equal(wanted)
    for text, words in enumerate(record.strings):
        for token, word in enumerate(words):
            image, _, row, column = wanted[text, token].tolist()
            special = image < 0 and rows[text][token] == IMAGE
            if image >= 0:
                assert word == f"<image {image + 1}> {row},{column}"
            assert special == (word.endswith("[CLS]"))


def test_packed_patches_of_two_pictures_and_their_squares_in_the_text() -> None:
    """Qwen2-VL: the order of the patches is that of transformers' image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tower = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=tower, image_token_id=IMAGE,
        video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    plain = hf.Qwen2VLForConditionalGeneration(config).eval()
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False, patch_size=4
    )
    pictures = []
    for rows, columns in ((4, 4), (4, 6)):
        number = torch.arange(rows)[:, None] * 10 + torch.arange(columns)  # of each patch
        pictures.append(number.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, -1, -1).numpy())
    made = processor(images=pictures, return_tensors="pt")
    sizes = made["image_grid_thw"]
    assert sizes.tolist() == [[1, 4, 4], [1, 4, 6]]
    ids = torch.tensor([[5, 92, *[IMAGE] * 4, 93, 6, 92, *[IMAGE] * 6, 93, 7]])
    given = {
        "input_ids": ids, "pixel_values": made["pixel_values"].float() / 50, "image_grid_thw": sizes,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }  # fmt: skip
    record = hw.load(plain, sample=given).record(**given)
    numbers = made["pixel_values"][:, 0].long().tolist()
    wanted = [f"{1 + (n >= 16)}: {number // 10},{number % 10}" for n, number in enumerate(numbers)]
    tower_record = record.part("vision")
    assert tower_record.strings[0] == wanted
    found = places(tower_record.grids, 1, 40)[0]
    assert (found[:, 2] * 10 + found[:, 3]).tolist() == numbers
    silent(plain.model.visual)
    before = entering(plain, given)
    for n, number in enumerate(numbers):
        changed = given["pixel_values"].clone()
        changed[n] += 1
        moved = (entering(plain, given | {"pixel_values": changed}) - before).abs().amax(-1)
        ((text, token),) = (moved > 1e-6).nonzero().tolist()
        assert record.strings[text][token] == f"<image {1 + (n >= 16)}> {number // 20},{number % 10 // 2}"


def test_rows_that_end_in_another_token_and_queries_of_a_resampler() -> None:
    tower = {**TOWER, "model_type": "pixtral", "image_size": 16}
    config = hf.LlavaConfig(
        vision_config=tower, text_config={**TEXT, "model_type": "mistral"}, image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    plain = hf.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, 91, IMAGE, IMAGE, IMAGE, 92, 7]])
    given = {"pixel_values": torch.randn(1, 3, 8, 12), "image_sizes": torch.tensor([[8, 12]])}
    record = hw.load(plain).record(ids, **given)  # without a sample: two pictures are packed into one row
    assert record.strings[0][1:8] == [f"<image> 0,{n}" for n in range(3)] + ["#91"] + [
        f"<image> 1,{n}" for n in range(3)
    ]
    assert places(record.grids, 1, 10)[0, :, 3].tolist() == [-1, 0, 1, 2, -1, 0, 1, 2, -1, -1]
    sizes = {"hidden_size": 16, "num_key_value_heads": 2}
    resampler = {
        **sizes,
        "resampler_n_latents": 3,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
    }
    idefics = hf.Idefics2Config(
        text_config={**TEXT, "model_type": "mistral"}, vision_config={**TOWER, "image_size": 8},
        perceiver_config=resampler, image_token_id=IMAGE,
    )  # fmt: skip
    ids = torch.tensor([[5, *[IMAGE] * 3, 6, *[IMAGE] * 3, 7]])
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 2, 3, 8, 8)}
    record = hw.load(hf.Idefics2ForConditionalGeneration(idefics).eval(), sample=given).record(**given)
    queries = [[f"<image {image}> query {n}" for n in range(3)] for image in (1, 2)]
    assert record.strings[0] == ["#5", *queries[0], "#6", *queries[1], "#7"]
    assert not any(record.grids)


@pytest.mark.parametrize("size", [[8, 16], [4, 16]])
def test_a_picture_read_whole_and_in_crops(size: list[int]) -> None:
    """LLaVA-NeXT: a border that was added to fill the crops up is cut off again."""
    tower = {**TOWER, "model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16}
    config = hf.LlavaNextConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=tower, image_grid_pinpoints=[[8, 16], [16, 8]],
        image_token_index=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = hf.LlavaNextForConditionalGeneration(config).eval()
    pixels, sizes = torch.randn(1, 3, 3, 8, 8), torch.tensor([size])
    count = len(plain.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output[0])
    ids = torch.tensor([[5, *[IMAGE] * count, 6, 7]])
    given = {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}
    record = hw.load(plain, sample=given).record(**given)
    silent(plain.model.vision_tower)
    before = entering(plain, given)
    named = {}  # where each patch of the whole picture, or of a crop, goes
    for crop, row, column in [(c, i, j) for c in range(3) for i in range(2) for j in range(2)]:
        changed = pixels.clone()
        changed[0, crop, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        moved = (entering(plain, given | {"pixel_values": changed}) - before).abs().amax(-1)[0] > 1e-6
        if moved.any():  # else it is border
            spot = (
                (row, column + 2 * (crop == 2)) if crop else (row, column)
            )  # the second crop stands right of the first
            named[moved.nonzero().item()] = ("detail " if crop else "", spot)
    top = min(spot[0] for kind, spot in named.values() if kind)
    for token, (kind, (row, column)) in named.items():
        assert record.strings[0][token] == f"<image> {kind}{row - top if kind else row},{column}"
    others = [
        word for token, word in enumerate(record.strings[0][: 1 + count]) if token and token not in named
    ]
    assert set(others) == {"<image> end of row"}
    for image, part in ((0, ""), (1, "detail ")):
        there = places(record.grids, 1, count + 3)[0]
        marked = {int(t): tuple(there[t, 2:].tolist()) for t in (there[:, 0] == image).nonzero()[:, 0]}
        assert marked == {
            t: (row - (top if kind else 0), column)
            for t, (kind, (row, column)) in named.items()
            if kind == part
        }


def test_positions_of_a_sound_are_seconds() -> None:
    """Whisper: a position of the encoder is two frames of 160 samples. wav2vec2: a product of strides in samples."""
    given = zoo.inputs("whisper")
    count = given["input_features"].shape[2]
    maker = hf.WhisperFeatureExtractor(feature_size=given["input_features"].shape[1])
    record = hw.load(zoo.build("whisper"), maker).record(**given)
    seconds = [f"{n * 2 * maker.hop_length / maker.sampling_rate:.2f} s" for n in range(count // 2)]
    assert record.part("encoder").strings[1] == record.part("cross").key_axis.strings[1] == seconds
    assert seconds[:2] == ["0.00 s", "0.02 s"]
    assert record.strings[0][0].startswith("#")

    plain, given = zoo.build("wav2vec2"), zoo.inputs("wav2vec2")
    record = hw.load(zoo.build("wav2vec2"), hf.Wav2Vec2FeatureExtractor(sampling_rate=100)).record(**given)
    samples = torch.zeros(1, given["input_values"].shape[1], requires_grad=True)
    plain.wav2vec2.feature_extractor.conv_layers[0].layer_norm = nn.Identity()  # it looks at the whole sound
    features = plain.wav2vec2.feature_extractor(samples)[0].sum(0)  # [position]
    for position, word in enumerate(record.strings[0]):
        (slope,) = torch.autograd.grad(features[position], samples, retain_graph=True)
        assert word == f"{slope[0].nonzero()[0].item() / 100:.2f} s"
    assert hw.load(zoo.build("whisper")).record(**zoo.inputs("whisper")).part("encoder").strings[0][1] == "#1"


def test_patches_that_come_with_their_places() -> None:
    """Pix2Struct: pictures of other shapes in one batch, filled up with padding, which is no token."""
    text = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16, "vocab_size": 99}
    tower = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "d_kv": 8, "d_ff": 16,
        "patch_embed_hidden_size": 48, "seq_len": 64,
    }  # fmt: skip
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = hf.Pix2StructConfig(text_config={**text, **special}, vision_config=tower)
    torch.manual_seed(0)
    plain = hf.Pix2StructForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    patches = torch.zeros(2, 8, 50)
    for picture, (rows, columns) in enumerate(((2, 4), (3, 2))):
        for n in range(rows * columns):
            patches[picture, n] = torch.cat(
                [torch.tensor([n // columns + 1.0, n % columns + 1.0]), torch.randn(48)]
            )
    given = {
        "flattened_patches": patches, "attention_mask": (patches.sum(-1) != 0).long(),
        "decoder_input_ids": torch.tensor([[0, 5, 6]] * 2),
    }  # fmt: skip
    with torch.no_grad():
        out = plain(**given, output_attentions=True)
    record = hw.load(plain, sample=given).record(**given)
    cross = record.part("cross")
    wide, tall = (
        [f"{n // columns},{n % columns}" for n in range(count)] for columns, count in ((4, 8), (2, 6))
    )
    assert cross.key_axis.strings == [wide, [*tall, "#6", "#7"]]
    assert cross.key_axis.valid.sum(1).tolist() == [8, 6]
    torch.testing.assert_close(cross.map(0).dense(), out.cross_attentions[0], atol=1e-6, rtol=1e-4)
    real = record.part("encoder").valid[:, None, :, None]
    torch.testing.assert_close(
        record.part("encoder").map(0).dense() * real, out.encoder_attentions[0] * real, atol=1e-6, rtol=1e-4
    )
