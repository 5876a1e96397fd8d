"""Edits as a file may hold them: numbers too large, empty lists, other types. Each is refused in one line."""

import pytest
import torch

import headwater as hw

HUGE = 10**30
HOSTILE = [
    ({"edit": "MaskPairs", "rule": {"kind": "near", "grid": [2, 2], "reach": HUGE}}, "reach is at most"),
    (
        {"edit": "MaskPairs", "rule": {"kind": "near", "grid": [2, 2], "reach": 1, "first": HUGE}},
        "first is at",
    ),
    ({"edit": "MaskPairs", "rule": {"kind": "dilated", "reach": 1, "step": HUGE}}, "step is at most"),
    ({"edit": "MaskPairs", "rule": {"kind": "windows", "grid": [2, 2], "size": HUGE}}, "size is at most"),
    ({"edit": "MaskPairs", "rule": {"kind": "moba", "size": 2, "top": HUGE}}, "top is at most"),
    ({"edit": "MaskPairs", "rule": {"kind": "blocks", "size": 2, "shown": []}}, "shown is empty"),
    ({"edit": "MaskPairs", "rule": {"kind": "tree", "documents": [], "parents": []}}, "documents is empty"),
    ({"edit": "MaskPairs", "rule": {"kind": ["near"]}}, "unknown kind"),
    ({"edit": "ScaleWeights", "keys": 0, "factor": 10**400}, "factor must be a finite number"),
    (
        {"edit": "ScaleWeights", "keys": {"slice": 5}, "factor": 2},
        "a slice is a list of start, stop and step",
    ),
    ({"edit": "ScaleWeights", "keys": {"slice": [1, 2, 3, 4]}, "factor": 2}, "a slice is a list of start"),
    ({"edit": "HeadMix", "convolution": [[10**400]]}, "convolution is"),
    ({"edit": "HeadMix", "pre": [[1e300] * 8] * 8}, "pre holds NaN or infinite numbers"),
    ({"edit": "RedistributeMassive", "dimensions": "many"}, "dimensions are numbers from 0 to"),
    ({"edit": "RedistributeMassive", "dimensions": 3}, "dimensions are numbers from 0 to"),
    ({"edit": "HeavyHitters", "recent": HUGE, "heavy": 1}, "recent is at most"),
]


@pytest.mark.parametrize(("data", "why"), HOSTILE)
def test_refused_in_one_line(data, why):
    model = hw.load("tasks-4l")
    with pytest.raises(hw.HeadwaterError, match=why) as told, model.edit(hw.edit_from_dict(data)):
        model.record("Mary gave John a drink")
    assert "\n" not in str(told.value)


def test_the_largest_whole_numbers_act():
    model, most = hw.load("tasks-4l"), 2**31 - 1
    plain = model("Mary gave John a drink")
    rules = (
        {"kind": "dilated", "reach": most, "step": 1},
        {"kind": "near", "grid": [2, 2], "reach": most, "first": most},
        {"kind": "blocks", "size": most, "shown": [[0]]},
        {"kind": "moba", "size": most, "top": most},
    )
    for rule in rules:  # nothing is hidden
        with model.edit(hw.MaskPairs(rule)):
            torch.testing.assert_close(model("Mary gave John a drink"), plain)
    with model.edit(hw.MaskPairs({"kind": "dilated", "reach": most, "step": most})):  # itself alone
        assert model.record("Mary gave John a drink").pattern(0, 0)[0].diagonal().eq(1).all()
