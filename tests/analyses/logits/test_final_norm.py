"""Shares along a path of streams against autograd through the twin's own norm and unembedding, point by point.

Mutations seen to fail: the mean left in, the term that turns the stream left out, the embedding's share integrated like
the others, epsilon forgotten, the quadrature's weights not halved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from patch_pairs import ANSWER, CLEAN, WRONG
from torch import Tensor, nn

import headwater as hw
from headwater import analyses
from headwater.analyses._streams.frozen_norm import Norm
from headwater.analyses._streams.readout import Readout
from headwater.analyses.logits import _final_norm
from headwater.lens.errors import AnalysisError

RIGHT, OTHER = torch.tensor([11, 12]), torch.tensor([20, 45])
GIVEN: dict[str, Any] = {"answer": ANSWER, "wrong": WRONG}


def through(norm: nn.Module, head: nn.Module, stream: Tensor) -> Tensor:
    """The logit difference of a stream [text, d_model] before a soft cap."""
    logits = head(norm(stream))
    return logits[range(2), RIGHT] - logits[range(2), OTHER]


def slopes(norm: nn.Module, head: nn.Module, begin: Tensor, end: Tensor) -> np.ndarray:
    """The mean gradient on the way, [text, d_model]; points are finest near the start."""
    total = np.zeros(end.shape)
    for place, weight in zip(*np.polynomial.legendre.leggauss(300), strict=True):
        alpha = math.exp(15 * (float(place) - 1))
        point = (begin + alpha * (end - begin)).requires_grad_()
        (slope,) = torch.autograd.grad(through(norm, head, point).sum(), point)
        total += 15 * weight * alpha * slope.numpy()
    return total


def sites(twin: Any, kind: str) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    if kind == "gpt2":
        return twin.transformer.ln_f, twin.lm_head, list(twin.transformer.h)
    return twin.model.norm, twin.lm_head, list(twin.model.layers)


def streams(twin: Any, kind: str, position: int) -> list[Tensor]:
    """The stream in front of every block and behind the last, [text, d_model] each."""
    norm, _, blocks = sites(twin, kind)
    kept: list[Tensor] = []
    watched = [
        block.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for block in (*blocks, norm)
    ]
    with torch.no_grad():
        twin(CLEAN)
    for handle in watched:
        handle.remove()
    return [stream[:, position] for stream in kept]


@pytest.mark.parametrize("norm", ["path_from_zero", "path_from_embedding"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_shares_are_integrals_of_the_gradient(pairs: Callable, kind: str, norm: Any) -> None:
    pair = pairs(kind)
    found = analyses.direct_logit_attribution(pair.model, CLEAN, **GIVEN, norm=norm, position=2)
    twin = pair.twin
    last, head, _ = sites(twin, kind)
    stream = streams(twin, kind, 2)
    begin = stream[0] if norm == "path_from_embedding" else torch.zeros_like(stream[0])
    slope = slopes(last, head, begin, stream[-1])
    with torch.no_grad():
        nothing = through(last, head, torch.zeros_like(begin))
        expected = (through(last, head, stream[0]) - nothing).numpy()
    if norm == "path_from_zero":
        expected = (slope * stream[0].numpy()).sum(-1)
    np.testing.assert_allclose(found.sel(component="embed"), expected, atol=2e-4, rtol=1e-4)
    for layer in range(3):  # a block is its heads, its bias and its MLP
        names = [f"{layer}.{head}" for head in range(4)] + [f"bias.{layer}", f"mlp.{layer}"]
        added = (stream[layer + 1] - stream[layer]).numpy()
        seen = found.sel(component=names).sum("component")
        np.testing.assert_allclose(seen, (slope * added).sum(-1), atol=2e-4, rtol=1e-4, err_msg=str(layer))
    np.testing.assert_allclose(found.sel(component="bias"), nothing.numpy(), atol=1e-6)
    assert found.attrs["norm"] == norm


@pytest.mark.parametrize("norm", ["path_from_zero", "path_from_embedding"])
def test_they_add_up_to_the_logits(pairs: Callable, norm: Any) -> None:
    for kind in ("gpt2", "llama", "mistral", "gemma2", "gpt_oss"):
        pair = pairs(kind)
        last, head, _ = sites(pair.twin, kind)
        for position in (0, -1):
            given = GIVEN | {"norm": norm, "position": position}
            with torch.no_grad():
                expected = through(last, head, streams(pair.twin, kind, position)[-1]).numpy()
            found = analyses.direct_logit_attribution(pair.model, CLEAN, **given)
            np.testing.assert_allclose(found.sum("component"), expected, atol=5e-5, err_msg=kind)
            np.testing.assert_allclose(found.sum("component"), found.total, atol=2e-5)
            heads = analyses.direct_logit_attribution(pair.model, CLEAN, unit="head", **given)
            np.testing.assert_allclose(heads[:, 1, 2], found.sel(component="1.2"), atol=1e-12)
            sources = analyses.direct_logit_attribution(pair.model, CLEAN, unit="source", **given)
            np.testing.assert_allclose(sources.sum("key"), heads, atol=5e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_with_a_scale_that_does_not_change_the_path_is_the_frozen_norm(pairs: Callable, kind: str) -> None:
    """A stream that is nothing beside epsilon is divided by the same length everywhere."""
    plain = copy.deepcopy(pairs(kind).twin).float()
    norm = sites(plain, kind)[0]
    setattr(norm, "eps" if kind == "gpt2" else "variance_epsilon", 1.0)
    small = ("wte", "wpe", "c_proj", "embed_tokens", "o_proj", "down_proj")
    with torch.no_grad():
        plain.lm_head.weight = nn.Parameter(1e4 * plain.lm_head.weight)
        for name, weight in plain.named_parameters():
            if any(part in name for part in small):
                weight *= 1e-4
    model = hw.load(plain)
    frozen, zero, embedded = (
        analyses.direct_logit_attribution(model, CLEAN, **GIVEN, norm=norm)
        for norm in ("frozen", "path_from_zero", "path_from_embedding")
    )
    assert float(abs(frozen).max()) > 0.01
    np.testing.assert_allclose(zero, frozen, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(embedded, frozen, rtol=1e-5, atol=1e-8)


def test_an_untouched_norm_differs_by_path(pairs: Callable) -> None:
    """What the options are for: with epsilon small the three are not the same."""
    shares = [
        analyses.direct_logit_attribution(pairs("llama").model, CLEAN, **GIVEN, norm=norm).values
        for norm in ("frozen", "path_from_zero", "path_from_embedding")
    ]
    assert all(
        np.abs(one - other).max() > 0.05 for one, other in zip(shares, shares[1:] + shares[:1], strict=True)
    )


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 0.05, 0.2, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("aligned", [0.0, 0.9, 1.0, -1.0])
def test_both_ways_to_integrate_agree_with_the_difference(size: float, aligned: float) -> None:
    """Paths that are short, long, along the stream and back through zero: shares add up, in float64."""
    generator = torch.Generator().manual_seed(3)
    begin, other, direction = torch.randn(3, 2, 24, generator=generator, dtype=torch.float64)
    end = begin + size * (aligned * begin + (1 - abs(aligned)) * other)
    for centred in (False, True):
        found = _final_norm.PathReadout.of(readout(centred, direction), 1e-5, begin, end)
        value = [_value(direction, stream, centred) for stream in (begin, end)]
        torch.testing.assert_close(found.begun, value[0], rtol=1e-12, atol=1e-12)
        moved = found.shares(end - begin)
        torch.testing.assert_close(moved, value[1] - value[0], rtol=1e-9, atol=1e-9)


def readout(centred: bool, direction: Tensor) -> Readout:
    norm = Norm(torch.ones(24, dtype=torch.float64), centred, torch.ones(2, dtype=torch.float64))
    return Readout(norm, direction, torch.zeros(2), torch.zeros(2))


def _value(direction: Tensor, stream: Tensor, centred: bool) -> Tensor:
    stream = stream - stream.mean(-1, keepdim=True) if centred else stream
    return (direction * stream).sum(-1) / (stream.square().mean(-1) + 1e-5).sqrt()


def test_what_has_no_path(pairs: Callable) -> None:
    with pytest.raises(AnalysisError, match="norm='thawed' is unknown; give one of frozen, path_from_zero"):
        analyses.direct_logit_attribution(pairs("llama").model, CLEAN, norm="thawed")  # type: ignore[arg-type]
    ones = torch.ones(2, 24, dtype=torch.float64)
    with pytest.raises(AnalysisError, match="a norm without an epsilon has no slope"):
        _final_norm.PathReadout.of(readout(False, ones), 0.0, 0 * ones, ones)
