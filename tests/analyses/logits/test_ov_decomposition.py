"""Decompositions of what heads move against the twin's own values and outputs in float64, and against source shares.

Mutations seen to fail: the norm behind Gemma's attention left out of what is moved, a direction read behind the norm
that is to be read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import dense_patching
import numpy as np
import pytest
import torch
from dense_patching import with_biases
from patch_pairs import ANSWER, CLEAN, WRONG

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

NAMES = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss")


def test_biases_are_part_of_what_is_moved(pairs: Callable) -> None:
    model = hw.load(with_biases(pairs("gpt2").twin).float())
    moved = analyses.ov_decomposition(model, CLEAN, head="1.2", answer=ANSWER, wrong=WRONG)
    shares = analyses.direct_logit_attribution(model, CLEAN, ANSWER, WRONG).sel(component="1.2")
    np.testing.assert_allclose(moved.sum(("component", "key")), shares, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_moved_adds_up_by_token_and_part(pairs: Callable, name: str) -> None:
    model = pairs(name).model
    sources = analyses.direct_logit_attribution(model, CLEAN, ANSWER, WRONG, unit="source")
    for head, shares in (("2.3", sources[:, 2, 3]), ("0.1", sources[:, 0, 1])):
        found = analyses.ov_decomposition(model, CLEAN, head=head, answer=ANSWER, wrong=WRONG)
        np.testing.assert_allclose(found.sum("component"), shares, atol=1e-4)
        np.testing.assert_allclose(found.sum(("component", "key")), found.total, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_direction_reads_what_the_head_writes(pairs: Callable, name: str) -> None:
    """The twin's own output of the head, times the direction; W_U behind the norm is the logit."""
    pair = pairs(name)
    model, twin = pair.model, pair.twin
    direction = torch.randn(32, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    given = {"head": "2.3", "position": 4}
    found = analyses.ov_decomposition(model, CLEAN, direction=direction, **given)
    np.testing.assert_allclose(found.sum(("component", "key")), found.total, atol=1e-4)
    if name != "gemma2":  # whose norm behind the attention is not the head's alone
        z = dense_patching.seen(twin, CLEAN)["z", 2][:, 4, 3]
        block = twin.transformer.h[2].attn.c_proj.weight if name == "gpt2" else None
        output = twin.model.layers[2].self_attn.o_proj.weight.T if block is None else block
        np.testing.assert_allclose(found.total, (z @ output[24:]).detach() @ direction, atol=1e-4)
    doubled = analyses.ov_decomposition(model, CLEAN, direction=(2 * direction).tolist(), **given)
    np.testing.assert_allclose(doubled, 2 * found, atol=1e-6)
    weight = twin.get_output_embeddings().weight.detach()
    for row, (right, other) in enumerate(((11, 20), (12, 45))):
        read = analyses.ov_decomposition(
            model,
            CLEAN[row : row + 1],
            direction=(weight[right] - weight[other]).numpy(),
            behind_norm=True,
            **given,
        )
        told = analyses.ov_decomposition(model, CLEAN[row], answer=f"#{right}", wrong=f"#{other}", **given)
        np.testing.assert_allclose(read, told, atol=1e-5)


def test_a_direction_from_a_file_and_what_is_none(pairs: Callable, tmp_path: Path) -> None:
    model = pairs("llama").model
    direction = np.linspace(-1, 1, 32)
    np.save(tmp_path / "probe.npy", direction)
    read = analyses.ov_decomposition(model, CLEAN, direction=str(tmp_path / "probe.npy"))
    np.testing.assert_array_equal(read, analyses.ov_decomposition(model, CLEAN, direction=direction))
    assert json.loads(read.attrs["direction"]) == direction.tolist()
    (tmp_path / "text.npy").write_text("no array", encoding="utf-8")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for bad, message in (
        (direction[:31], r"direction has shape \(31,\); give \(32,\), the width of"),
        (direction[None], r"shape \(1, 32\)"),
        (np.where(direction > 0.9, np.nan, direction), r"direction\[30\] is nan; give finite numbers"),
        (0 * direction, "zero everywhere"),
        (["a", "b"], "list of numbers"),
        ([[1.0], [1.0, 2.0]], "list of numbers"),
        ("probe.txt", "no .npy file"),
        (tmp_path / "absent.npy", "can not be read"),
        (tmp_path / "text.npy", "holds no array"),
        (tmp_path / "objects.npy", "holds no array"),
    ):
        with pytest.raises(AnalysisError, match=message):
            analyses.ov_decomposition(model, CLEAN, direction=bad)  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="direction and answer ask for different things"):
        analyses.ov_decomposition(model, CLEAN, direction=direction, answer=ANSWER)
    with pytest.raises(AnalysisError, match="behind_norm is about a direction"):
        analyses.ov_decomposition(model, CLEAN, behind_norm=True)


def test_a_model_whose_stream_is_no_sum(pairs: Callable) -> None:
    with pytest.raises(AnalysisError, match="is no sum of what its parts add"):
        analyses.ov_decomposition(pairs("bert").model, CLEAN)
