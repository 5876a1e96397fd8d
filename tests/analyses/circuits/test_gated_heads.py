"""Heads with an output gate in patches, paths, edges and logits, against hooks on the eager model.

A head is what enters the output projection: z times its gate. Its input of queries holds the gate too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gated_models
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.analyses._streams.component_graph import Inputs, Wiring

G = torch.Generator().manual_seed(3)
CLEAN = torch.randint(3, 90, (1, 8), generator=G)
CORRUPT = CLEAN.clone()
CORRUPT[0, 3] = (CLEAN[0, 3] + 7) % 80 + 3
NAMES = ("Qwen3Next", "Laguna")


@contextmanager
def changed(hooks: list[tuple[Any, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, function in hooks:
            stack.callback(module.register_forward_pre_hook(function).remove)
        yield


def logits(hf: Any, ids: Tensor, *hooks: tuple[Any, Any]) -> Tensor:
    with torch.no_grad(), changed(list(hooks)):
        return hf(input_ids=ids, use_cache=False).logits[0].double()


def entering(hf: Any, ids: Tensor, layer: int) -> Tensor:
    kept: list[Tensor] = []
    output = gated_models.attention_of(hf, layer).o_proj
    logits(hf, ids, (output, lambda module, args: kept.append(args[0])))
    return kept[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_head_is_its_gated_output(name: str) -> None:
    hf = gated_models.gated(name)
    clean = entering(hf, CLEAN, 0)

    def put(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., 16:24] = clean[..., 16:24]  # head 2
        return (x,)

    moved = logits(hf, CORRUPT, (gated_models.attention_of(hf, 0).o_proj, put))[-1, 11]
    from_, to = logits(hf, CORRUPT)[-1, 11], logits(hf, CLEAN)[-1, 11]
    found = analyses.patch(
        hw.load(gated_models.gated(name)), [(CLEAN[0], CORRUPT[0])], measure=lambda x: x[:, -1, 11]
    )
    assert float(found.sel(layer=0, head=2).sum()) == pytest.approx(
        float((moved - from_) / (to - from_)), abs=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_edge_into_the_queries_reaches_the_gate(name: str) -> None:
    hf = gated_models.gated(name)
    attention, block = gated_models.attention_of(hf, 1), hf.get_submodule("model.layers.1")
    gate = attention.q_proj if name == "Qwen3Next" else attention.g_proj
    with torch.no_grad():
        embedded = {n: hf.get_input_embeddings()(ids)[0] for n, ids in (("a", CLEAN), ("b", CORRUPT))}
        kept: list[Tensor] = []
        logits(hf, CLEAN, (block, lambda module, args: kept.append(args[0])))
        other = block.input_layernorm(kept[0] - embedded["a"] + embedded["b"])

    def one_head(module: Any, args: Any, output: Tensor) -> Tensor:
        with torch.no_grad():
            seen = torch.nn.functional.linear(other, module.weight, module.bias)
        output = output.clone()
        width = output.shape[-1] // 4
        output[..., 3 * width :] = seen[..., 3 * width :]  # head 3
        return output

    with ExitStack() as stack:
        for module in dict.fromkeys((attention.q_proj, gate)):
            stack.callback(module.register_forward_hook(one_head).remove)
        expected = logits(hf, CLEAN)
    wiring = Wiring(hw.load(gated_models.gated(name)), "kv")

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> Tensor | None:
        if (group.layer, group.kind) != (1, "q"):
            return None
        streams = x[:, None].repeat(1, len(group.names), 1, 1)
        streams[:, 3] += embedded["b"] - embedded["a"]
        return streams

    found, _ = wiring.run(CLEAN, reads)
    torch.testing.assert_close(found[0].double().detach(), expected, atol=1e-5, rtol=1e-4)
    assert float((expected - logits(hf, CLEAN)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_logit_and_what_a_head_moves_add_up(name: str) -> None:
    hf = gated_models.gated(name)
    whole = logits(hf, CLEAN)[-1]
    model = hw.load(gated_models.gated(name))
    parts = analyses.direct_logit_attribution(model, CLEAN, answer="#11", wrong="#23")
    assert float(parts.sum()) == pytest.approx(float(whole[11] - whole[23]), rel=1e-4, abs=1e-5)
    moved = analyses.ov_decomposition(model, CLEAN, head="1.2", answer="#11", wrong="#23")
    assert float(moved.sum()) == pytest.approx(float(parts.sel(component="1.2").sum()), rel=1e-4, abs=1e-5)
    by_source = analyses.direct_logit_attribution(model, CLEAN, answer="#11", wrong="#23", unit="source")
    expected = float(parts.sel(component="0.1").sum())
    assert float(by_source.sel(layer=0, head=1).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_frozen_heads_keep_their_gates_in_path_patching() -> None:
    name = "Qwen3Next"
    hf = gated_models.gated(name)
    first, second = (gated_models.attention_of(hf, layer).o_proj for layer in (0, 1))
    clean, corrupt = entering(hf, CLEAN, 0), entering(hf, CORRUPT, 0)
    frozen = entering(hf, CLEAN, 1)

    def send(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = clean.clone()
        x[..., 8:16] = corrupt[..., 8:16]
        return (x,)

    moved = logits(hf, CLEAN, (first, send), (second, lambda module, args: (frozen,)))[-1, 11]
    to, from_ = logits(hf, CLEAN)[-1, 11], logits(hf, CORRUPT)[-1, 11]
    found = analyses.path_patch(
        hw.load(gated_models.gated(name)), CLEAN, CORRUPT, receivers="logits",
        measure=lambda x: x[:, -1, 11],
    )  # fmt: skip
    value = float(found.sel(sender="0.1").sum())
    assert value == pytest.approx(float((moved - to) / (from_ - to)), abs=1e-4)
    assert abs(value) > 1e-3
