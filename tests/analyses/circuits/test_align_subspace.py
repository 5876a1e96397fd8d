"""A planted linear model whose subspace is known: tokens are pairs (a, b), and the logits read both.

Exchanging `a` alone gives (a of the source, b of the base); exchanging the whole vector gives the source's token.

Seen to fail: the whole vector in the place of the learned part; the answer read where the vector is exchanged; a file
whose directions are not checked.
"""

from __future__ import annotations

import json
from typing import Any

import planted_models
import pytest
import torch
from safetensors.torch import save

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, HeadwaterError

N = 3  # values of a and of b


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    stream = planted_models._Stream({"a": N, "b": N}, 1, 1, N * N, 4, [2**0.5])
    a, b = (torch.eye(N)[each] for each in (torch.arange(N * N) // N, torch.arange(N * N) % N))
    for part, rows in (("a", a), ("b", b)):
        stream.embed(stream.model.transformer.wte, part, rows)
        stream.model.lm_head.weight[:, stream.parts[part]] = 5 * rows
    return hw.load(stream.model)


def test_the_known_subspace_is_found_and_controls_fail(model) -> None:
    sides = [(s, b) for s in range(N * N) for b in range(N * N) if s // N != b // N and s % N != b % N]
    clean, corrupt = (torch.tensor([[each[n]] for each in sides]) for n in (0, 1))
    labels = [N * (s // N) + b % N for s, b in sides]
    found = analyses.align_subspace(
        model, clean, corrupt, layers=[0], size=2, answer=labels, steps=120, rate=0.03, batch_size=40
    )
    assert found.accuracy.sel(by="learned").item() == 1
    assert found.accuracy.sel(by="full").item() == 0  # it carries b too
    assert found.accuracy.sel(by="none").item() == 0
    assert found.accuracy.sel(by="random").item() < 0.5
    basis = torch.from_numpy(found.basis.values[0])
    torch.testing.assert_close(basis @ basis.T, torch.eye(2).double(), atol=1e-5, rtol=0)
    # differences of values of a lie in the subspace, those of b outside
    table = model.hf.transformer.wte.weight.detach().double()
    for difference, least, most in ((table[0] - table[N], 0.9, 1.01), (table[0] - table[1], 0.0, 0.45)):
        assert least <= float((basis @ difference).norm() / difference.norm()) <= most

    edits = [
        hw.edit_from_dict(each.to_dict()) for each in analyses.subspace_edits(model, found, "0", clean[:1])
    ]
    same = [n for n, s in enumerate(clean[:, 0].tolist()) if s == int(clean[0, 0])]
    with model.edit(*edits):
        assert model(corrupt[same])[:, -1].argmax(-1).tolist() == [labels[n] for n in same]


def exchanged(model: hw.HookedModel, pair: Any, module: Any, at: int, cut: slice) -> float:
    """Nats of the answer when the base's input of `module` has the source's features at one position."""
    seen = []

    def hook(_: Any, given: Any) -> Any:
        x = given[0].clone()
        if seen:
            x[:, at, cut] = seen[0]
        seen.append(given[0][:, at, cut].clone())
        return x, *given[1:]

    handle = module.register_forward_pre_hook(hook)
    with torch.no_grad():
        _, logits = (
            model.hf(model.to_tokens(text).ids).logits[0, -1] for text in (pair.prompt, pair.corrupt)
        )
    handle.remove()
    label = model.tokenizer(f" {pair.answer}", add_special_tokens=False)["input_ids"][0]
    return float(-logits.log_softmax(-1)[label])


def test_a_vector_is_exchanged_at_one_position_and_the_answer_read_at_another(tmp_path) -> None:
    """Full exchange by forward hooks of torch, each pair at a position of its own."""
    model = hw.load("tasks-4l")
    pairs = analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=60), "answer")[:8]
    at = [model.to_tokens(pair.corrupt).shape[1] - 5 + n % 2 for n, pair in enumerate(pairs)]
    settings = {"steps": 1, "controls": 1, "batch_size": 4}
    stream = analyses.align_subspace(model, pairs, layers=[1], at=at, **settings)
    head = analyses.align_subspace(model, pairs, what="head", heads="1.3", at=at, **settings)
    judged = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()[:4]
    block, width = model.hf.model.layers[1], model.d_value
    places = {"stream": (block, slice(None)), "head": (block.self_attn.o_proj, slice(3 * width, 4 * width))}
    for (module, cut), found in zip(places.values(), (stream, head), strict=True):
        losses = [exchanged(model, pairs[n], module, at[n], cut) for n in judged]
        assert found.loss.sel(by="full").item() == pytest.approx(sum(losses) / 4, abs=1e-4)
        assert found.loss.sel(by="full").item() != pytest.approx(found.loss.sel(by="none").item(), abs=1e-3)
    with pytest.raises(AnalysisError, match="positions of their own"):
        analyses.subspace_edits(model, stream, "1", pairs[0].prompt)
    again = analyses.read_subspace(analyses.write_subspace(stream, tmp_path / "at.safetensors"), model)
    assert again.attrs["at"] == stream.attrs["at"] == str(at)
    with pytest.raises(AnalysisError, match="3 positions for 8 pairs"):
        analyses.align_subspace(model, pairs, at=at[:3])


def test_directions_are_kept_in_a_file_that_is_checked(model, tmp_path) -> None:
    ids = torch.tensor([[0], [4], [8], [1]])
    file = tmp_path / "named.safetensors"
    for settings in ({"what": "mlp"}, {"what": "head", "heads": "0.0"}):
        found = analyses.align_subspace(
            model, ids, ids.flip(0), **settings, size=2, steps=1, answer=[1, 2, 3, 4]
        )
        again = analyses.read_subspace(analyses.write_subspace(found, file), model)
        torch.testing.assert_close(again.basis.values, found.basis.values, atol=1e-7, rtol=0)
        assert again.site.values.tolist() == found.site.values.tolist()
        assert (again.attrs["what"], again.attrs["at"]) == (settings["what"], -1)
    other = hw.load("tasks-4l")
    with pytest.raises(AnalysisError, match="numbers there"):
        analyses.read_subspace(file, other)
    analyses.write_subspace(found.assign(basis=2 * found.basis), file)
    with pytest.raises(AnalysisError, match="not orthonormal"):
        analyses.read_subspace(file, model)
    basis = torch.eye(2, model.d_model)
    for site, what in (("00", "mlp"), ("1٣", "mlp"), ("7", "mlp"), ("0.00", "head"), ("0.9", "head")):
        basis = torch.eye(2, model.d_value if what == "head" else model.d_model)
        file.write_bytes(save({site: basis}, {"subspace": json.dumps({"what": what, "at": -1})}))
        with pytest.raises(HeadwaterError, match=r"no layer|no head|no such head"):
            analyses.read_subspace(file, model)
    odd = [
        save({"0": basis}, {"subspace": json.dumps({"what": what, "at": -1})}) for what in ([], None, "all")
    ]
    for content in (b"", b"x" * 40, file.read_bytes()[:-3], *odd):
        file.write_bytes(content)
        with pytest.raises(AnalysisError, match="is not a file of write_subspace"):
            analyses.read_subspace(file, model)


def test_pairs_cross_the_names() -> None:
    tasks = hw.load("tasks-4l")
    examples = hw.prompt_set("indirect_object", n=12)
    for variable in ("position", "answer"):
        for pair in analyses.cross_pairs(tasks, examples, variable):
            source = next(e for e in examples if pair.prompt in (e.prompt, e.corrupt))
            base = next(e for e in examples if e.prompt == pair.corrupt)
            told = source.answer if pair.prompt == source.prompt else source.wrong[0]
            if variable == "answer":
                assert pair.answer == told
                continue
            names = sorted((base.answer, base.wrong[0]), key=base.prompt.index)
            others = sorted((source.answer, source.wrong[0]), key=lambda name: pair.prompt.index(name))
            assert pair.answer == names[others.index(told)]
            assert pair.wrong == (base.answer,) != (pair.answer,)


def test_what_does_not_fit_is_refused(model) -> None:
    ids = torch.tensor([[0], [4], [8], [1]])
    for settings, told in (
        ({"size": 13}, "size=13"),
        ({"heads": "0.0"}, "what="),
        ({"answer": None}, "no answers"),
    ):
        with pytest.raises(AnalysisError, match=told):
            analyses.align_subspace(
                model, ids, ids.flip(0), **{"answer": [1, 2, 3, 4], "steps": 1, **settings}
            )
    with pytest.raises(AnalysisError, match="too few"):
        analyses.align_subspace(model, ids[:2], ids[2:], answer=[1, 2])
    found = analyses.align_subspace(
        model, ids, ids.flip(0), what="head", heads="0.0", answer=[1, 2, 3, 4], steps=1
    )
    assert found.basis.shape == (1, 1, model.d_value)
    with pytest.raises(AnalysisError, match="heads have no edit"):
        analyses.subspace_edits(model, found, "0.0", ids[:1])
