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
