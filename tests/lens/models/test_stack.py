"""How mixers without a map are told in one line."""

from __future__ import annotations

from headwater.lens.models.stack import Mixer, named


def test_layers_of_mixers_are_told_in_runs():
    mixers = [Mixer(n, f"layers.{n}.m", "M") for n in (0, 1, 2, 4, 5, 9)]
    assert named(mixers) == ["M in layers 0-2, 4, 5 and 9 (layers.*.m)"]
    assert named(mixers[:3]) == ["M in layers 0-2 (layers.*.m)"]
    assert named(mixers[-1:]) == ["M in layer 9 (layers.*.m)"]
