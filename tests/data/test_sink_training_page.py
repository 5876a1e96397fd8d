"""How a sink comes in training: the page has the numbers that its script has kept. Seen to fail: a changed digit."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_tells_how_the_sink_comes() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "sink_training.json").read_text("utf-8"))
    page = (ROOT / "docs" / "analyses" / "sinks.md").read_text("utf-8")
    steps = {row["step"]: row for row in kept["runs"]["softmax"]["by_step"]}
    for step, row in steps.items():
        sink = f"{row['sink_rate']:.3f} | {max(map(max, row['first_share'])):.2f}"
        scores = " | ".join(f"{max(layer):.1f}" for layer in row["max_logit"])
        assert f"| {step:,} | {row['loss']:.2f} | {row['copied_right']:.2f} | {sink} | {scores} |" in page
    early = [row for step, row in steps.items() if step <= 600]
    assert all(row["sink_rate"] == 0 and row["copied_right"] < 0.02 for row in early)
    assert steps[800]["sink_rate"] > 0.05
    assert steps[800]["copied_right"] > 0.5
    assert steps[1250]["sink_rate"] < 0.01 < steps[2500]["sink_rate"]
    assert f"since step 100 ({steps[100]['after_triggers_right']:.2f})" in page
    largest = {step: max(row["max_logit"][1]) for step, row in steps.items()}
    assert (
        f"from {largest[0]:.1f} to {largest[300]:.1f} in layer 1, and are at {largest[2500]:.1f} at the end"
        in page
    )
    assert largest[300] == max(largest.values())


def test_the_page_tells_how_rows_of_a_sigmoid_grow_heavy() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "sink_training.json").read_text("utf-8"))
    page = (ROOT / "docs" / "analyses" / "sinks.md").read_text("utf-8")
    steps = {row["step"]: row for row in kept["runs"]["sigmoid, bias -ln n"]["by_step"]}
    for step in (0, 100, 200, 600, 1000, 2000):
        row = steps[step]
        told = f"{row['loss']:.2f} | {row['copied_right']:.2f} | {row['sink_rate_of_shares']:.3f}"
        assert f"| {step:,} | {told} | {row['row_mass']:.2f} |" in page
    assert all(row["row_mass"] > 4.7 for step, row in steps.items() if step >= 200)
    assert max(row["copied_right"] for row in steps.values()) < 0.04
    before = {row["step"]: row for row in kept["runs"]["softmax"]["by_step"]}[600]
    assert f"({steps[2000]['loss']:.2f} against {before['loss']:.2f})" in page


def test_the_page_tells_that_a_sigmoid_with_light_rows_copies_without_a_sink() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "sink_training.json").read_text("utf-8"))["runs"]
    page = (ROOT / "docs" / "analyses" / "sinks.md").read_text("utf-8")
    steps = {row["step"]: row for row in kept["sigmoid, bias -ln 64, rows held"]["by_step"]}
    for step in (0, 100, 200, 600, 800, 1000, 1250, 1500, 2000, 3000, 4000):
        row = steps[step]
        rates = f"{row['sink_rate']:.3f} ({row['sink_rate_of_shares']:.3f})"
        told = f"{row['loss']:.2f} | {row['copied_right']:.2f} | {rates}"
        largest = max(map(max, row["first_share"]))
        assert (
            f"| {step:,} | {told} | {largest:.2f} | {row['row_mass']:.2f} | {row['heavy_rows']:.3f} |" in page
        )
    assert all(row["sink_rate"] == row["sink_rate_of_shares"] == 0 for row in steps.values())
    end, softmax = steps[4000], kept["softmax"]["by_step"][-1]
    for name, digits in (("copied_right", "0.97 both"), ("loss", "3.09 both")):
        assert f"{end[name]:.2f}" == f"{softmax[name]:.2f}" == digits.split()[0]
        assert f"({digits})" in page
    assert f"later ({steps[2500]['copied_right']:.2f} and {steps[2500]['loss']:.2f} at step 2,500)" in page
    assert steps[800]["copied_right"] < 0.05 < 0.5 < steps[1000]["copied_right"]
    assert f"(from {steps[800]['row_mass']:.2f} to {steps[1000]['row_mass']:.2f})" in page
    assert f"rows sum to {end['row_mass']:.2f} at the end" in page
    assert f"At the end {end['heavy_rows']:.3f} of the rows pay" in page


def test_the_page_tells_how_far_four_layers_without_positions_came() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "sink_training.json").read_text("utf-8"))["runs"]
    page = (ROOT / "docs" / "analyses" / "sinks.md").read_text("utf-8")
    steps = {row["step"]: row for row in kept["no positions, 4 layers"]["by_step"]}
    end = max(steps)
    for step in {0, 100, 200, 400, 600, 800, 1000, 1250, 1500, end}:
        row = steps[step]
        told = f"{row['after_triggers_right']:.2f} | {row['copied_right']:.2f} | {row['sink_rate']:.3f}"
        assert f"| {step:,} | {row['loss']:.2f} | {told} |" in page
    assert f"was stopped at step {end:,} of 4,000" in page
    answered = {"100": kept["softmax"]["by_step"][2], "800": steps[800]}
    for step, row in answered.items():
        assert str(row["step"]) == step
        assert f"at step {step} ({row['after_triggers_right']:.2f})" in page
    assert f"Up to step {end:,} copies do not come ({steps[end]['copied_right']:.2f} right)" in page
    assert all(row["sink_rate"] == 0 for row in steps.values())
    assert all(row["copied_right"] < 0.05 for row in steps.values())
