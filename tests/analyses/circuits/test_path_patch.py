"""Path patching against three dense runs written by hand, and on a circuit that was built by hand.

Mutations seen to fail: other heads left free, MLPs always frozen, the sender left as it was, receivers read in the
prompt as it is, an MLP that sends into every copy, receivers below the sender looked for in its run.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import dense_patching
import numpy as np
import planted_models
import pytest
import torch
from patch_pairs import ANSWER, CLEAN, CORRUPT, WRONG, difference
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

Parts = list[tuple[str, int, int]]  # q, k or v; layer; head


def three_runs(twin, sender: str, receivers: Parts, frozen: bool, base: Tensor, other: Tensor) -> Tensor:
    """Logits of the third run; without receivers those of the second, whose stream is all that the logits see."""
    here, there = dense_patching.seen(twin, base), dense_patching.seen(twin, other)
    met: dict[tuple[str, int], Tensor] = {}

    def second(kind: str, layer: int, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if kind == "z":
            tensor = here[kind, layer].clone()
            if sender.startswith(f"{layer}."):
                head = int(sender.split(".")[1])
                tensor[:, :, head] = there[kind, layer][:, :, head]
        if kind == "mlp" and frozen:
            tensor = here[kind, layer].clone()
        if kind == "mlp" and sender == f"mlp.{layer}":
            tensor = there[kind, layer].clone()
        if (kind, layer, sender) == ("resid", 0, "embed"):
            tensor = there[kind, layer].clone()
        met[kind, layer] = tensor
        return tensor

    logits = dense_patching.visited(twin, base, second)
    if not receivers:
        return logits

    def third(kind: str, layer: int, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        for part, at, head in receivers:
            if (kind, layer) == (part, at):
                tensor[:, :, head] = met[kind, layer][:, :, head]
            if (kind, layer, part) == ("resid", at, "resid"):
                tensor = met[kind, layer].clone()
        return tensor

    return dense_patching.visited(twin, base, third)


def densely(twin, senders: list[str], receivers: Parts, frozen: bool, how: str) -> np.ndarray:
    """Effects [pair, sender]."""
    base, other = (CORRUPT, CLEAN) if how == "denoise" else (CLEAN, CORRUPT)
    begin, end = (difference(twin(ids).logits.detach()) for ids in (base, other))
    found = [difference(three_runs(twin, name, receivers, frozen, base, other)) for name in senders]
    return torch.stack([(logits - begin) / (end - begin) for logits in found], 1).numpy()


def check(found, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.values, expected, atol=2e-4, rtol=2e-4)
    assert found.values.std() > 1e-3


@pytest.mark.parametrize(
    ("name", "receivers", "parts", "frozen", "how"),
    [
        ("gpt2", "logits", [], False, "noise"),
        ("gpt2", "logits", [], True, "denoise"),
        ("gpt2", "2.1.k", [("k", 2, 1)], False, "denoise"),
        ("gpt2", "2.1.k", [("k", 2, 1)], True, "noise"),
        ("gpt2", ["1.0.q", "2.3.v"], [("q", 1, 0), ("v", 2, 3)], False, "noise"),
        ("gpt2", "residual.2", [("resid", 2, 0)], False, "noise"),
        ("llama", "2.3.q, 1.2.q", [("q", 2, 3), ("q", 1, 2)], True, "noise"),
        ("llama", "2.1.v", [("v", 2, 1)], False, "noise"),
        ("mistral", "2.0.k", [("k", 2, 0)], False, "noise"),
        ("gemma2", "2.0.v", [("v", 2, 0)], True, "denoise"),
        ("gpt_oss", "logits", [], False, "noise"),
    ],
)
def test_three_runs(pairs: Callable, name, receivers, parts, frozen, how) -> None:
    pair = pairs(name)
    found = analyses.path_patch(
        pair.model, CLEAN, CORRUPT, receivers=receivers, mlps="frozen" if frozen else "free", how=how,
        answer=ANSWER, wrong=WRONG, per="kv_head",
    )  # fmt: skip
    senders = found.coords["sender"].values.tolist()
    last = max((layer for _, layer, _ in parts), default=3)
    each = [f"{layer}.{head}" if head < 4 else f"mlp.{layer}" for layer in range(last) for head in range(5)]
    assert senders == ["embed", *each]
    check(found, densely(pair.twin, senders, parts, frozen, how))


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 12))]
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_any_set_of_receivers(pairs: Callable, name: str, seed: int) -> None:
    """Receivers stand in any layers, also more than one apart and in the last sender's own."""
    pair, draw = pairs(name), random.Random(seed)
    heads = {"q": pair.model.n_heads, "k": pair.model.n_kv_heads, "v": pair.model.n_kv_heads}
    every = [(part, layer, head) for layer in range(3) for part in "qkv" for head in range(heads[part])]
    parts = draw.sample(every, draw.randint(1, 5)) if seed else [("q", 0, 0), ("q", 2, 0)]
    frozen, how = draw.choice([False, True]), draw.choice(["noise", "denoise"])
    found = analyses.path_patch(
        pair.model, CLEAN, CORRUPT, receivers=[f"{layer}.{head}.{part}" for part, layer, head in parts],
        mlps="frozen" if frozen else "free", how=how, answer=ANSWER, wrong=WRONG, per="kv_head",
    )  # fmt: skip
    senders = found.sender.values.tolist()
    np.testing.assert_allclose(found, densely(pair.twin, senders, parts, frozen, how), atol=2e-4, rtol=2e-4)


def test_one_query_heads_view_of_shared_keys(pairs: Callable) -> None:
    pair = pairs("llama")
    wide = dense_patching.ungrouped(pair.twin)
    for part in "kv":
        found = analyses.path_patch(
            pair.model, CLEAN, CORRUPT, receivers=f"2.3.{part}", per="query_head", answer=ANSWER, wrong=WRONG
        )
        senders = found.coords["sender"].values.tolist()
        check(found, densely(wide, senders, [(part, 2, 3)], False, "noise"))
    with pytest.raises(AnalysisError, match="share one head of k; say which"):
        analyses.path_patch(pair.model, CLEAN, CORRUPT, receivers="2.3.k")


def edges(model, clean: Tensor, corrupt: Tensor, least: float, **more) -> set[tuple[str, str]]:
    """Every (sender, receiver) of the two-layer model whose effect is more than `least` for every pair."""
    answer, wrong = ([f"#{row[4]}" for row in side.tolist()] for side in (clean, corrupt))
    receivers = [f"{layer}.{head}.{part}" for layer in range(2) for head in range(4) for part in "qkv"]
    found = set()
    for receiver in [*receivers, "logits"]:
        effect = analyses.path_patch(
            model, clean, corrupt, receivers=receiver, answer=answer, wrong=wrong, **more
        )
        strong = (abs(effect) > least).all("batch")
        assert (strong == (abs(effect) > least).any("batch")).all()
        found |= {(str(sender), receiver) for sender in effect.sender.values[strong.values]}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mlps", ["free", "frozen"])
def test_the_circuit_of_the_planted_model(mlps: str) -> None:
    """Words that differ move the edges that carry words; nothing in a layer's place says where positions are read."""
    planted = planted_models.induction()
    model = hw.load(planted.model)
    words = torch.stack(
        [torch.randperm(11, generator=torch.Generator().manual_seed(n)) + 1 for n in range(3)]
    )
    bos = torch.zeros(3, 1, dtype=torch.long)
    clean, corrupt = (torch.cat([bos, side, side[:, :3]], 1) for side in (words[:, :5], words[:, 5:10]))
    of_places = {("embed", "0.1.q"), ("embed", "0.1.k")}
    assert edges(model, clean, corrupt, 1e-3, mlps=mlps) == planted.edges - of_places
    assert edges(model, clean, corrupt, 0.3, mlps=mlps, ablation="zero") == planted.edges


def test_what_can_not_be_asked(pairs: Callable) -> None:
    model = pairs("llama").model
    for message, given in (
        ("no 1.3.k; .* key–value heads 0 to 1", {"receivers": "1.3.k", "per": "kv_head"}),
        ("no 3.0.q", {"receivers": "3.0.q"}),
        ("can not be read", {"receivers": "logits, 1.0.q"}),
        ("can not be read", {"receivers": "1.0"}),
        ("no layer 3", {"receivers": "residual.3"}),
        ("mlps='off' is unknown", {"mlps": "off"}),
    ):
        with pytest.raises(AnalysisError, match=message):
            analyses.path_patch(model, CLEAN, CORRUPT, **given)
    bert = pairs("bert").model
    with pytest.raises(AnalysisError, match=r"what the MLPs of .* add to the stream is not known"):
        analyses.path_patch(bert, CLEAN, CORRUPT, mlps="frozen")


def test_a_model_that_reads_both_ways(pairs: Callable) -> None:
    """Behind BERT's norms what an MLP adds has no name; heads and the embedding send."""
    pair = pairs("bert")
    found = analyses.path_patch(pair.model, CLEAN, CORRUPT, receivers="2.1.k", answer=ANSWER, wrong=WRONG)
    senders = found.coords["sender"].values.tolist()
    assert senders == ["embed", *(f"{layer}.{head}" for layer in range(2) for head in range(4))]
    check(found, densely(pair.twin, senders, [("k", 2, 1)], False, "noise"))
