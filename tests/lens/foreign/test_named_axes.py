"""Axes and tokens of a foreign module under names of the user."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw


class Painter(nn.Module):
    """Places of a picture attend to each other, then to words."""

    def forward(self, x, words):
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return F.scaled_dot_product_attention(x[:, None], words[:, None], words[:, None])[:, 0]


SAMPLE = torch.randn(1, 7, 8), torch.randn(1, 2, 8)
AXES = {"self": {"image": (2, 3)}, "cross": {"image": (2, 3), "words": ["a", "cat"]}}


def test_tokens_have_the_names_of_the_user(tmp_path):
    model = hw.load(Painter(), sample=SAMPLE, axes=AXES)
    record = model.record((torch.randn(2, 7, 8), torch.randn(2, 2, 8)))
    assert record.strings[1] == ["#0", "0,0", "0,1", "0,2", "1,0", "1,1", "1,2"]
    assert record.grids[0][0].shape == (1, 2, 3)
    cross = record.part("cross")
    assert cross.strings[0] == record.strings[0]
    assert cross.key_axis.strings[1] == ["a", "cat"]
    assert cross.provenance["axes"] == ["image", "words"]
    record.save(tmp_path / "painted.safetensors")
    assert hw.Record.open(tmp_path / "painted.safetensors").part("cross").key_axis.strings[0] == ["a", "cat"]


def test_distances_are_the_grids():
    model = hw.load(Painter(), sample=SAMPLE, axes=AXES)
    record = model.record((torch.randn(1, 7, 8), torch.randn(1, 2, 8)))
    place = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0))
    weights = record.map(0).dense()[0, 0, 1:, 1:].double()
    weights = weights / weights.sum(-1, keepdim=True)
    hops = torch.cdist(place, place, p=float("inf")).double()
    expected = (weights * hops).sum(-1).mean()
    found = hw.analyses.patch_distance(record)
    torch.testing.assert_close(torch.tensor(found["mean_hops"].item()), expected.float())


def test_other_sizes_are_numbered():
    model = hw.load(Painter(), sample=SAMPLE, axes={"cross": {"place": None, "words": ["a", "cat"]}})
    record = model.record((torch.randn(1, 4, 8), torch.randn(1, 3, 8))).part("cross")
    assert record.strings[0] == ["#0", "#1", "#2", "#3"]
    assert record.key_axis.strings[0] == ["#0", "#1", "#2"]
    small = hw.load(Painter(), sample=SAMPLE, axes=AXES).record((torch.randn(1, 4, 8), torch.randn(1, 2, 8)))
    assert small.strings[0] == record.strings[0]
    assert small.grids[0] == ()


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        ({"selves": {"image": (2, 3)}}, "no part 'selves': did you mean 'self'"),
        ({"self": (2, 3)}, "the part 'self' has one axis"),
        ({"cross": {"image": (2, 3)}}, "two axes, of its queries and of its keys"),
        ({"self": {"image": (2, 0)}}, "stand on a grid"),
        ({"self": {"image": "abc"}}, "called by a list of texts"),
        ({"self": {"image": (2, 4)}}, "are 7 tokens on the sample, and"),
        ({"self": {"image": ["a", "b"]}}, "are 7 tokens on the sample, and"),
        ([("self", 3)], "can not be read; give"),
    ],
)
def test_names_that_are_none(axes, why):
    with pytest.raises(hw.HeadwaterError, match=why):
        hw.load(Painter(), sample=SAMPLE, axes=axes)


def test_transformers_name_their_own():
    with pytest.raises(hw.HeadwaterError, match="axes= names the tokens of a module outside transformers"):
        hw.load("tasks-4l", axes=AXES)
