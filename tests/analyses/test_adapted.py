"""Analyses that read weights: an unmerged adapter gives the merged model's numbers, few bits the dequantised model's.

Mutation seen to fail: the stored weight taken for what the module gives.
"""

from __future__ import annotations

import functools
from typing import Any

import adapted
import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits._graphs import edges_of
from headwater.analyses.heads.circuit_rank import sides
from headwater.analyses.heads.head_roles import copying_scores
from headwater.lens.errors import ModelError
from headwater.lens.models.weights import circuit_ends

CLEAN = torch.tensor([[5, 17, 30, 8, 22, 9], [40, 9, 3, 31, 7, 13]])
CORRUPT = torch.tensor([[5, 17, 44, 8, 51, 9], [40, 9, 6, 31, 7, 13]])
PAIRS = list(zip(CLEAN, CORRUPT, strict=True))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"]


@functools.cache
def both(kind: str) -> tuple[hw.HookedModel, hw.HookedModel, float]:
    """A model, its twin with plain weights, and how far their numbers may be apart."""
    if kind == "lora":
        pytest.importorskip("peft")
        model = adapted.adapted(TARGETS)
        return hw.load(model), hw.load(adapted.merged(model)), 1e-3
    pytest.importorskip("bitsandbytes")
    found, twin = adapted.few_bits(int(kind))
    return hw.load(found), hw.load(twin), 5e-2


def edges(model: hw.HookedModel) -> np.ndarray:
    graph = analyses.edge_attribution(model, PAIRS, answer="#11", wrong="#23", draws=1)
    return np.array([graph.edges[edge]["score"] for edge in sorted(edges_of(graph))])


def routes(model: hw.HookedModel) -> np.ndarray:
    graph = analyses.information_flow_routes(model, CLEAN)
    return np.array([graph.edges[edge]["score"] for edge in sorted(edges_of(graph))])


def copying(model: hw.HookedModel) -> np.ndarray:
    embed, unembed = circuit_ends(model)
    ends = unembed.double() @ embed.double()
    return torch.stack([copying_scores(sides(model, layer), ends) for layer in model.layers]).numpy()


READ: dict[str, Any] = {
    "edges": edges,
    "routes": routes,
    "copying": copying,
    "composition": lambda model: analyses.composition(model, draws=2).score.fillna(0).values,
    "rank": lambda model: analyses.circuit_rank(model).singular_values.values,
    "attribution": lambda model: (
        analyses.direct_logit_attribution(model, CLEAN, answer="#11", wrong="#23").values
    ),
    "values": lambda model: analyses.ov_decomposition(model, CLEAN, head="1.1", answer="#11").values,
}


# in 4 bits a CPU computes in bfloat16 and gives no gradients, so what weights alone decide is compared
CASES = [(kind, name) for kind in ("lora", "8") for name in READ]
CASES += [("4", name) for name in ("copying", "composition", "rank")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_numbers_are_those_of_the_plain_twin(kind: str, name: str) -> None:
    model, twin, error = both(kind)
    found, expected = READ[name](model), READ[name](twin)
    assert found.shape == expected.shape
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() <= error * size
    if kind == "lora":
        other = READ[name](hw.load(adapted.plain()))
        assert np.abs(other - expected).max() > 0.05 * size  # the adapters matter


def test_weights_without_gradients_are_refused_where_gradients_are_asked() -> None:
    model, _, _ = both("4")
    with pytest.raises(ModelError, match="gives no gradient"):
        edges(model)
