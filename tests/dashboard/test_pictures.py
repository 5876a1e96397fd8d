"""Numbers of patches lie over the picture where the patches are, and figures of records show their maps."""

from __future__ import annotations

import html
import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from transformers import MistralConfig, MistralForCausalLM, ViTConfig, ViTModel

import headwater as hw
from headwater import analyses
from headwater.dashboard.charts.flow import over_picture
from headwater.dashboard.figures import style
from headwater.lens.errors import AnalysisError
from headwater.lens.examples.sample_pictures import sample_pictures
from headwater.lens.loading import zoo


def per_patch(values: np.ndarray, before: tuple[str, ...] = ("[CLS]",), dim: str = "key") -> xr.DataArray:
    """A result per token of an image: special tokens, then the patches row by row, as records name them."""
    names = [*before, *(f"{row},{column}" for row, column in np.ndindex(values.shape))]
    numbers = np.concatenate([np.full(len(before), 9.0), values.ravel()])
    return xr.DataArray(numbers, dims=(dim,), coords={f"{dim}_token": (dim, names)}, attrs={"unit": "share"})


def centre(trace, shape: tuple[int, int], spot: tuple[int, int]) -> tuple[float, float]:
    """Row and column of the pixel on which a cell of a heat map stands."""
    assert trace.z.shape == shape
    return trace.y[spot[0]], trace.x[spot[1]]


def test_many_methods_over_a_picture_are_scrolled_on_a_narrow_screen() -> None:
    """Their names would stand over each other there."""
    grids = {name: np.eye(2) for name in ("rollout", "attention flow", "value zeroing")}
    places = np.arange(4).reshape(2, 2)
    assert over_picture(grids, None, places, "Shares", "share").layout.meta == style.WIDE
    alone = over_picture({"rollout": np.eye(2)}, None, places, "Shares", "share")
    assert alone.layout.meta is None


@pytest.mark.parametrize("corner", [(0, 0), (0, 4), (2, 0), (2, 4)])
def test_a_bright_patch_lies_on_its_corner_of_the_picture(corner) -> None:
    values = np.zeros((3, 5))
    values[corner] = 1.0
    picture = np.zeros((30, 50, 3), dtype=np.uint8)
    row, column = corner[0] * 10, corner[1] * 10
    picture[row : row + 10, column : column + 10] = 255
    drawn = hw.figure(per_patch(values), image=picture)
    below, veil, _ = drawn.data
    assert (below.type, veil.type) == ("image", "heatmap")
    y, x = centre(veil, (3, 5), np.unravel_index(np.argmax(veil.z), veil.z.shape))
    assert below.z[round(y)][round(x)][0] == 255
    assert (y, x) == (row + 4.5, column + 4.5)
    assert list(drawn.layout.yaxis.range) == [29.5, -0.5]  # rows of pixels run down
    assert drawn.layout.yaxis.scaleanchor == "x"


def test_tokens_that_are_no_patches_are_said_and_leave_the_colours_alone() -> None:
    drawn = hw.figure(per_patch(np.full((2, 2), 0.5), ("[CLS]", "[REG1]")), image=np.zeros((4, 4)))
    _, veil, bars = drawn.data
    assert veil.xaxis != bars.xaxis
    assert (list(bars.x), list(bars.y)) == (["0 [CLS]", "1 [REG1]"], [9.0, 9.0])
    assert drawn.layout.yaxis2.matches is None
    assert drawn.data[1].zmax == 0.5


def test_patches_without_a_picture_are_a_grid() -> None:
    values = np.arange(6.0).reshape(2, 3)
    drawn = hw.figure(per_patch(values))
    np.testing.assert_array_equal(drawn.data[0].z, values)
    assert [drawn.layout.yaxis.title.text, drawn.layout.xaxis.title.text] == ["row, patch", "column, patch"]


@pytest.mark.parametrize(
    "picture",
    [
        np.full((4, 4), 0.5), np.full((4, 4, 3), 128, dtype=np.uint8), torch.full((1, 3, 4, 4), 0.5),
        np.full((4, 4, 4), 0.5), torch.full((1, 4, 4), 0.5),
    ],
)  # fmt: skip
def test_pictures_come_in_many_shapes(picture) -> None:
    shown = hw.figure(per_patch(np.ones((2, 2))), image=picture).data[0].z
    assert np.asarray(shown).shape == (4, 4, 3)
    assert set(np.unique(shown)) == {128}


def test_every_kind_of_picture_keeps_its_colours() -> None:
    """Seen to fail with palette numbers, ink and flags taken for colours, and with 16 bits cut at 255."""
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    colours[0, 0], colours[1, 1] = 0, 255
    picture = Image.fromarray(colours)
    dark = np.asarray(picture.convert("L")) < 128
    for given, expected in [
        (picture.convert("P", palette=Image.Palette.ADAPTIVE), colours),
        (picture.convert("CMYK"), colours),
        (Image.fromarray(~dark), np.where(dark, 0, 255)[..., None].repeat(3, 2)),
        (~dark, np.where(dark, 0, 255)[..., None].repeat(3, 2)),
        (Image.merge("LA", [picture.getchannel(0)] * 2), colours[..., :1].repeat(3, 2)),
        (colours.astype(np.uint16) * 257, colours),
        (colours.astype(int) - 128, colours),
        (torch.tensor(colours / 255).permute(2, 0, 1).bfloat16(), colours),
    ]:
        shown = np.asarray(hw.figure(per_patch(np.ones((2, 2))), image=given).data[0].z)
        np.testing.assert_allclose(shown, expected, atol=1)


def test_normalised_pixels_are_stretched() -> None:
    picture = torch.zeros(1, 3, 4, 4)
    picture[..., 0, 0], picture[..., 1, 1] = -2.0, 3.0
    shown = np.asarray(hw.figure(per_patch(np.ones((2, 2))), image=picture).data[0].z)
    assert (shown[0, 0, 0], shown[1, 1, 0], shown[2, 2, 0]) == (0, 255, 102)


@pytest.mark.parametrize(
    ("result", "picture", "words"),
    [
        (per_patch(np.ones((2, 2))), np.zeros((4, 8)), "picture is 4 × 8 pixels and the grid 2 × 2"),
        (per_patch(np.ones((2, 2))), np.zeros((5, 3, 4, 4)), "not several or a video"),
        (per_patch(np.ones((2, 2))), np.zeros((5, 4, 7)), "1, 3 or 4 channels"),
        (per_patch(np.ones((2, 2))).isel(key=slice(0, 4)), np.zeros((4, 4)), "do not fill one grid"),
        (xr.DataArray([1.0, 2.0], dims="key"), np.zeros((4, 4)), "no numbers per patch"),
        (xr.Dataset({"a": ("layer", [1.0])}), np.zeros((4, 4)), "per patch of an image"),
    ],
)  # fmt: skip
def test_what_does_not_lie_on_the_picture_is_one_line(result, picture, words) -> None:
    with pytest.raises(hw.HeadwaterError, match=words) as caught:
        hw.figure(result, image=picture)
    assert "\n" not in str(caught.value)


def test_one_picture_is_not_laid_under_the_rows_of_several_examples() -> None:
    model = hw.load("vit-digits")
    shown = [example.image for example in list(sample_pictures("vit-digits").values())[:2]]
    found = hw.analyses.word_on_picture(model.record(model.to_tokens(shown)), position=0, layers=[3])
    with pytest.raises(AnalysisError, match="2 examples and image is one picture"):
        hw.figure(found, image=shown[0])
    assert hw.figure(found, image=shown[0], batch=0).data


def test_a_rollout_of_a_vision_model_lies_on_its_own_picture() -> None:
    config = ViTConfig(
        image_size=(24, 16), patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = hw.load(ViTModel(config, add_pooling_layer=False).eval())
    pixels = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    record = model.record(pixels)
    result = hw.analyses.rollout(record, queries=[0])
    drawn = hw.figure(result, image=pixels)
    np.testing.assert_allclose(drawn.data[1].z, result.values[0, 0, 1:].reshape(3, 2), rtol=1e-6)
    received = record.figure(1, 0, statistic="received", image=pixels)
    np.testing.assert_allclose(
        received.data[1].z, record.pattern(1, 0)[0].sum(0)[1:].reshape(3, 2), rtol=1e-5
    )


@pytest.fixture(scope="module")
def record() -> hw.Record:
    return hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")


def test_the_map_of_a_head_is_exact_with_its_tokens(record) -> None:
    drawn = record.figure(1, 2)
    np.testing.assert_array_equal(drawn.data[0].z, record.pattern(1, 2)[0].numpy())
    assert drawn.layout.xaxis3.ticktext[:2] == ("0 &lt;bos&gt;", "1 When")
    assert drawn.layout.title.text == "Which tokens does head 1.2 attend to?"
    of_map = hw.figure(record.map(1), head=2, tokens=record.strings[0])
    np.testing.assert_array_equal(of_map.data[0].z, drawn.data[0].z)


@pytest.mark.parametrize("most", [512, 2])
def test_a_prompt_of_a_batch_is_drawn_as_if_it_were_alone(most, monkeypatch) -> None:
    """Seen to fail with padding drawn and counted among the queries."""
    from headwater.dashboard.figures import records

    monkeypatch.setattr(records, "MOST_CELLS", most)
    model = hw.load("tasks-4l")
    short, long = "When Mary and John", "When Mary and John went to the store"
    both, alone = model.record([long, short]), model.record(short)
    shown, expected = hw.figure(both, layer=1, head=0, batch=1), hw.figure(alone, layer=1, head=0)
    for trace, other in zip(shown.data, expected.data, strict=True):
        for numbers in {"x", "y", "z"} & set(trace):
            if other[numbers] is not None:
                np.testing.assert_allclose(trace[numbers], other[numbers], atol=1e-5)
    assert shown.layout.xaxis3.ticktext == expected.layout.xaxis3.ticktext
    assert shown.layout.yaxis3.ticktext == expected.layout.yaxis3.ticktext
    tiles, others = hw.figure(both, batch=1), hw.figure(alone)
    np.testing.assert_allclose(tiles.data[9].z, others.data[9].z, atol=1e-5)
    assert "batch 1 of 2 · 5 tokens" in tiles.layout.title.subtitle.text
    received = hw.figure(both, layer=1, head=0, batch=1, statistic="received")
    np.testing.assert_allclose(received.data[0].y, alone.statistic("received")[0, 1, 0], atol=1e-5)
    assert "batch 1" in received.layout.title.subtitle.text
    assert "tokens and 2 prompts" in hw.figure(both, statistic="entropy").layout.title.text


def test_padding_before_a_prompt_is_left_out(record) -> None:
    """Places keep the numbers that they have in the record."""
    from headwater.dashboard.figures.records import map_figure, mosaic

    map, words = record.map(1), record.strings[0]
    weights, within = record.pattern(1, 2)[0].numpy(), (slice(4, 15), slice(2, 15))
    drawn = map_figure(map, 2, 0, words, words, "T", spans=within)
    np.testing.assert_array_equal(drawn.data[0].z, weights[4:, 2:])
    assert drawn.layout.yaxis3.ticktext[0].startswith("4 ")
    assert drawn.layout.xaxis3.ticktext[0].startswith("2 ")
    np.testing.assert_array_equal(mosaic({1: map}, 0, "T", spans=within).data[2].z, weights[4:, 2:])


def test_what_a_key_receives_is_a_mean_over_the_queries_that_see_it() -> None:
    """Seen to fail with every later query counted where a window hides far keys."""
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=3,
    )  # fmt: skip
    record = hw.load(MistralForCausalLM(config)).record(torch.arange(8)[None])
    seen = np.minimum(3, 8 - np.arange(8))
    expected = record.pattern(0, 1)[0].sum(0).numpy() / seen
    np.testing.assert_allclose(record.figure(0, 1).data[1].y, expected, rtol=1e-5)


def test_tokens_that_are_given_name_both_axes(record) -> None:
    drawn = record.figure(1, 2, tokens=list("abcdefghijklmno"))
    assert drawn.layout.xaxis3.ticktext[:2] == drawn.layout.yaxis3.ticktext[:2] == ("0 a", "1 b")


def test_a_long_map_is_pooled_with_margins_of_the_whole() -> None:
    record = hw.load("tasks-4l").record(torch.randint(5, 300, (1, 128)))
    plain, pooled = record.figure(1, 2), None
    from headwater.dashboard.figures import records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MOST_CELLS", 40)
        pooled = records.map_figure(record.map(1), 2, 0, record.strings[0], record.strings[0], "T")
    np.testing.assert_allclose(pooled.data[1].y, plain.data[1].y, rtol=1e-5)
    np.testing.assert_allclose(pooled.data[2].x, plain.data[2].x, rtol=1e-4, atol=1e-5)


def test_a_mosaic_holds_each_head_in_its_place_and_stays_small(record) -> None:
    drawn = hw.figure(record)
    assert len(drawn.data) == 32
    by_name = {trace.hovertemplate.split("<br>")[0]: trace for trace in drawn.data}
    tile = by_name["head 2.5"]
    np.testing.assert_array_equal(tile.z, record.pattern(2, 5)[0].numpy())
    assert (round(tile.x0), round(tile.y0)) == (5, 2)
    assert tile.x0 + 14 * tile.dx < 5.5 < by_name["head 2.6"].x0
    assert {(trace.zmin, trace.zmax) for trace in drawn.data} == {(0.0, 1.0)}
    assert "each cell is one weight" in drawn.layout.title.subtitle.text
    assert len(hw.figure(record, layer=1).data) == len(hw.figure(record.map(1)).data) == 8
    long = hw.load("tasks-4l").record(torch.randint(5, 300, (1, 128)))
    pooled = long.figure()
    assert "largest weight of 3 × 3" in pooled.layout.title.subtitle.text
    assert pooled.data[0].z.shape == (43, 43)
    assert pooled.data[0].z[10, 10] == long.pattern(0, 0)[0, 30:33, 30:33].max()
    assert len(json.dumps(json.loads(pooled.to_json()))) < 5_000_000


def test_the_cells_of_a_mosaic_are_bounded_for_many_heads() -> None:
    from headwater.dashboard.figures.records import mosaic

    map = hw.load("tasks-4l").record(torch.randint(5, 300, (1, 128))).map(0)
    drawn = mosaic(dict.fromkeys(range(60), map), 0, "T")
    assert sum(trace.z.size for trace in drawn.data) <= 300_000


def test_a_statistic_is_a_mean_over_tokens_or_goes_through_them(record) -> None:
    drawn = record.figure(statistic="entropy")
    np.testing.assert_allclose(
        drawn.data[0].z, record.statistic("entropy").mean(["batch", "query"]).values, rtol=1e-6
    )
    assert "mean over tokens" in drawn.layout.title.text
    one = record.figure(1, 2, statistic="entropy")
    np.testing.assert_allclose(one.data[0].y, record.statistic("entropy")[0, 1, 2].values, rtol=1e-6)
    received = record.figure(statistic="received")  # its mean over keys is the same for every head
    assert len(received.layout.updatemenus[0].buttons) == 15


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"head": 1}, "needs its layer"),
        ({"layer": 9}, "layer 9 is not in the record"),
        ({"layer": 1, "head": 8}, "no head 8; the map has heads 0 to 7"),
        ({"statistic": "entropi"}, "unknown statistic"),
        ({"statistic": "entropy", "head": 9}, "no head 9"),
        ({"batch": 1}, "no batch row 1"),
        ({"role": "induction"}, "takes layer, head, statistic, batch; got role"),
        ({"image": np.zeros((4, 4))}, "one number per patch"),
        ({"layer": 1, "head": "a"}, "head= takes one whole number, counted from 0; got 'a'"),
        ({"layer": 1, "head": [0, 1]}, "head= takes one whole number"),
        ({"layer": 1.0, "head": 0}, "layer= takes one whole number"),
        ({"batch": "0"}, "batch= takes one whole number"),
        (
            {"layer": 1, "head": 0, "tokens": ["a"]},
            "tokens= holds 1 texts; the result has 15 along query, 15",
        ),
    ],
)
def test_what_a_record_does_not_have_is_one_line(record, asked, words) -> None:
    with pytest.raises(hw.HeadwaterError, match=words) as caught:
        hw.figure(record, **asked)
    assert "\n" not in str(caught.value)


@pytest.mark.browser
def test_a_figure_becomes_an_svg(record, tmp_path) -> None:
    """Through kaleido and the machine's Chromium, as `headwater[figures]` has it."""
    pytest.importorskip("kaleido", reason="headwater[figures] is not installed")
    if shutil.which("chromium") is None and shutil.which("google-chrome") is None:
        pytest.skip("no Chromium on this machine")
    file = tmp_path / "a.svg"
    hw.figure(analyses.attention_distance(record)).write_image(file)
    drawn = file.read_text()
    assert drawn.startswith("<svg")
    assert "How far from the query does each head look?" in drawn


def test_a_row_of_a_text_lies_over_its_picture() -> None:
    """Seen to fail with the text's first tokens taken for the first patches."""
    record = hw.load(zoo.build("llava")).record(**zoo.inputs("llava", lengths=(11, 8)))
    found = analyses.raw_attention(record, layers=1)[0]
    drawn = hw.figure(found, image=np.zeros((12, 12, 3)))
    _, veil, others = drawn.data
    np.testing.assert_allclose(veil.z, found.values[0, 2:11].reshape(3, 3), atol=1e-7)
    assert np.isclose(others.y[-1], found.values[0, record.valid[0].sum() - 1])
    bars = hw.figure(found)
    assert [trace.type for trace in bars.data] == ["bar"]
    assert any("<image> 0,1" in html.unescape(str(label)) for label in bars.data[0].x)


def test_pictures_of_one_text_and_frames_are_drawn_one_by_one() -> None:
    record = hw.load(zoo.build("llava")).record(
        torch.tensor([[5, *[90] * 18, 7]]), pixel_values=torch.randn(2, 3, 12, 12)
    )
    found = analyses.raw_attention(record, heads="0.0")
    with pytest.raises(AnalysisError, match=r"several pictures; hw\.on_grid"):
        hw.figure(found, image=np.zeros((12, 12, 3)))
    drawn = hw.figure(hw.on_grid(found, 1), image=np.zeros((12, 12, 3)))
    np.testing.assert_allclose(drawn.data[1].z, found.values[0, 0, 10:19].reshape(3, 3), atol=1e-7)
    video = xr.DataArray(np.arange(12.0).reshape(2, 2, 3), dims=("frame", "row", "column"), name="weight")
    panels = hw.figure(video).data
    np.testing.assert_array_equal(panels[0].z, video[0])
    np.testing.assert_array_equal(panels[1].z, video[1])


def test_both_sides_of_a_model_are_told_on_one_axis() -> None:
    record = hw.load(zoo.build("t5")).record(**zoo.inputs("t5"))
    (bars,) = hw.figure(analyses.rollout(record)[0, 0]).data
    words = [*record.part("encoder").strings[0], *record.strings[0]]
    sides = ["encoder"] * 11 + ["decoder"] * 7
    told = zip(sides, words, strict=True)
    assert list(bars.x) == [f"{n} {side}: {word}" for n, (side, word) in enumerate(told)]
