"""Where patches stand is found from runs: tokens that enter the tower alike for every picture are no patches.

The oracle is the tower's own embedding module on pictures that differ in one patch. Seen to fail with all special
tokens counted as a prefix, with columns before rows, and with names in the order of the alphabet.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import headwater as hw
from headwater.lens.loading import zoo

NAMES = {
    "yolos": (["[CLS]"], ["[DET1]", "[DET2]", "[DET3]"]), "deit": (["[CLS]", "[DIST]"], []), "vit": (["[CLS]"], []),
    "dinov3": (["[CLS]", "[REG1]", "[REG2]"], []), "siglip": ([], []),
}  # fmt: skip


def inputs_of(family: str) -> dict[str, Any]:
    return dict(zoo.inputs(family))


def place_of_patch(hf: Any, pixels: Tensor, row: int, column: int) -> int:
    """The token of the embedding module's output that changes with one patch."""
    embeddings = getattr(hf, "vision_model", hf).embeddings
    changed = pixels.clone()
    size = zoo.PATCH
    changed[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size] += 1
    with torch.no_grad():
        before, after = embeddings(pixels), embeddings(changed)
    return int((after - before).abs().amax((0, 2)).argmax())


@pytest.mark.parametrize("family", NAMES)
def test_labels_stand_where_their_tokens_stand(family: str) -> None:
    hf, given = zoo.build(family), inputs_of(family)
    plain = copy.deepcopy(hf)
    record = hw.load(hf).record(**given)
    record = record.parts.get("vision", record)
    before, behind = NAMES[family]
    grid = [f"{row},{column}" for row in range(3) for column in range(3)]
    assert record.strings[0] == [*before, *grid, *behind]
    for row, column in ((0, 0), (0, 2), (1, 0), (2, 1)):
        place = place_of_patch(plain, given["pixel_values"], row, column)
        assert record.strings[0][place] == f"{row},{column}"


def test_groups_and_distances_leave_out_tokens_behind_the_patches() -> None:
    model, given = hw.load(zoo.build("yolos")), inputs_of("yolos")
    groups = model.token_groups(model.to_tokens(**given))
    assert groups["image"][0].tolist() == [False, *[True] * 9, False, False, False]
    assert groups["special"].equal(~groups["image"])
    record = model.record(**given)
    found = hw.analyses.patch_distance(record)
    weights = torch.stack([record.map(layer).dense() for layer in record.layers], 1).double()
    to_others = weights[..., 1:10, :].sum(-2) / 9
    wanted = to_others[..., :1].sum(-1) + to_others[..., 10:].sum(-1)
    torch.testing.assert_close(torch.tensor(found.to_prefix.values), wanted.mean(0))
    place = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    hops = (place[:, None] - place).abs().amax(-1)
    ring = torch.stack([(weights[..., 1:10, 1:10] * (hops == k)).sum((-1, -2)) / 9 for k in range(3)], -1)
    torch.testing.assert_close(torch.tensor(found.strength.values), ring.mean(0))


def test_named_positions_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = hw.load(zoo.build("yolos")), inputs_of("yolos")
    with model.edit(hw.Knockout(queries="image", keys="special")):
        weights = model.record(**given).map(0).dense()
    special = torch.tensor([True, *[False] * 9, True, True, True])
    assert bool((weights[:, :, ~special][..., special] == 0).all())
    assert bool((weights[:, :, special][..., special] > 0).all())


def test_patches_out_of_order_have_numbers() -> None:
    hf, given = zoo.build("vit"), inputs_of("vit")
    embed = hf.embeddings.forward

    def turned(*args: Any, **kwargs: Any) -> Tensor:
        states = embed(*args, **kwargs)
        return torch.cat([states[:, :1], states[:, 1:].unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)], 1)

    hf.embeddings.forward = turned  # column by column
    record = hw.load(hf).record(**given)
    assert record.strings[0] == [f"#{i}" for i in range(10)]
    assert not any(record.grids)


@pytest.mark.parametrize("name", ["VideoMAE", "Vivit"])
def test_every_patch_of_a_video_has_its_frame_row_and_column(name: str) -> None:
    """The oracle changes one patch of one pair of frames, and looks which token moves behind the embeddings."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tube: Any = 2 if name == "VideoMAE" else [2, 4, 4]
    config = getattr(transformers, f"{name}Config")(
        **sizes,
        image_size=(8, 12) if name == "VideoMAE" else 8,
        patch_size=4,
        num_frames=4,
        tubelet_size=tube,
    )
    plain = getattr(transformers, f"{name}Model")(config).eval()
    pixels = torch.randn(2, 4, 3, 8, 12 if name == "VideoMAE" else 8)
    record = hw.load(plain, sample={"pixel_values": pixels}).record(pixel_values=pixels)
    embed = partial(plain.embeddings, bool_masked_pos=None) if name == "VideoMAE" else plain.embeddings
    with torch.no_grad():
        before = embed(pixels)
        for frame, row, column in np.ndindex(2, 2, pixels.shape[-1] // 4):
            changed = pixels.clone()
            changed[0, 2 * frame : 2 * frame + 2, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
            ((text, token),) = ((embed(changed) - before).abs().amax(-1) > 1e-6).nonzero().tolist()
            assert record.strings[text][token] == f"{frame},{row},{column}"
    found = hw.analyses.patch_distance(record)
    weights = torch.stack([record.map(layer).dense() for layer in record.layers], 1).double()
    own = [place for place, word in enumerate(record.strings[0]) if word[0] != "["]
    weights = weights[..., own, :][..., own]
    when = torch.tensor([int(record.strings[0][place].split(",")[0]) for place in own])
    apart = (when[:, None] - when).abs()
    wanted = ((weights * apart).sum(-1) / weights.sum(-1)).mean((0, -1))
    torch.testing.assert_close(torch.tensor(found.mean_frames.values), wanted)


def test_what_convolutions_made_of_squares_stands_on_a_grid() -> None:
    """DETR: queries look at a picture in squares of 32 pixels, also where the last ones are cut.

    The oracle is the feature map of the backbone: a token is the projection of the features at its row and column.
    """
    backbone = {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        num_queries=4, encoder_ffn_dim=32, decoder_ffn_dim=32, backbone_config=backbone,
        use_pretrained_backbone=False, use_timm_backbone=False, backbone=None,
    )  # fmt: skip
    plain = transformers.DetrModel(config).eval()
    pixels = torch.randn(1, 3, 96, 150)
    record = hw.load(plain, sample={"pixel_values": pixels}).record(pixel_values=pixels)
    assert record.part("encoder").strings[0] == [f"{row},{column}" for row in range(3) for column in range(5)]
    seen = hw.on_grid(hw.analyses.raw_attention(record.part("cross"), queries="all"))
    assert dict(seen.sizes) == {"batch": 1, "query": 4, "row": 3, "column": 5}
    projected: list[Tensor] = []  # [1, channel, row, column]
    plain.input_projection.register_forward_hook(lambda module, args, out: projected.append(out))
    entered: list[Tensor] = []
    plain.encoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
    )
    with torch.no_grad():
        plain(pixels)
    for token, word in enumerate(record.part("encoder").strings[0]):
        row, column = map(int, word.split(","))
        torch.testing.assert_close(
            entered[0][0, token], projected[0][0, :, row, column], atol=1e-5, rtol=1e-4
        )
    dense = record.part("cross").map(0).dense().mean(1)
    np.testing.assert_allclose(seen[0], dense[0].reshape(4, 3, 5), atol=1e-6)
