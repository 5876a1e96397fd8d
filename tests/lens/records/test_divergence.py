"""attention_divergence against the formulas on dense maps, and a student that learns its teacher's maps from it.

Seen to fail: teacher and student exchanged, rows of padding counted, the heads of a pair exchanged, pairs in the order
of layers and not as asked, the student's maps without a graph.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from scipy.special import rel_entr, xlogy

import headwater as hw
from headwater.lens.errors import HeadError, RecordError

HEADS = {"2.1": "0.3", "0.0": "0.3", "2.0": "0.1"}


@pytest.fixture(scope="module")
def records():
    ids, mask = tiny_models.batch()
    return [hw.load(tiny_models.tiny("llama", seed)).record(ids, mask) for seed in (0, 1)]


def by_hand(teacher, student, own: str, other: str, how: str) -> list[float]:
    found = []
    for row, real in enumerate(student.valid.numpy()):
        (a, h), (b, g) = (map(int, name.split(".")) for name in (own, other))
        s, t = (
            record.pattern(layer)[row, head].double().numpy()[real][:, real]
            for record, layer, head in ((student, a, h), (teacher, b, g))
        )
        ways = {
            "cross_entropy": -xlogy(t, s).sum(-1),
            "kl": rel_entr(t, s).sum(-1),
            "js": (rel_entr(t, (s + t) / 2) + rel_entr(s, (s + t) / 2)).sum(-1) / 2,
        }
        found.append(ways[how].mean())
    return found


@pytest.mark.parametrize("how", ["cross_entropy", "kl", "js"])
def test_pairs_are_in_the_order_asked_and_hold_the_formula(records, how):
    teacher, student = records
    found = hw.attention_divergence(teacher, student, HEADS, how)
    expected = np.array([by_hand(teacher, student, *pair, how) for pair in HEADS.items()]).T
    assert found.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    every = hw.attention_divergence(teacher, student, how=how)
    assert every.shape == (2, tiny_models.LAYERS * tiny_models.HEADS)
    assert every[:, 5].tolist() == pytest.approx(
        by_hand(teacher, student, "1.1", "1.1", how), rel=1e-4, abs=1e-5
    )
    itself = hw.attention_divergence(teacher, teacher, how=how)
    assert (itself.abs().max() < 1e-5) == (how != "cross_entropy")


def test_a_student_learns_the_maps_of_its_teacher():
    ids, mask = tiny_models.batch()
    teacher, student = (hw.load(tiny_models.tiny("llama", seed)) for seed in (0, 1))
    target = teacher.record(ids, mask, statistics=())
    learned = [p for n, p in student.hf.named_parameters() if "q_proj" in n or "k_proj" in n]
    optimiser, losses = torch.optim.Adam(learned, lr=0.02), []
    for _ in range(12):
        loss = hw.attention_divergence(
            target, student.record(ids, mask, grad=True, statistics=()), how="kl"
        ).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert target.map(0).q.requires_grad is False


@pytest.mark.parametrize("how", ["cross_entropy", "kl", "js"])
def test_gradients_are_those_of_the_formula_on_dense_maps(records, how):
    teacher, _ = records
    ids, mask = tiny_models.batch()
    model = hw.load(tiny_models.tiny("llama", 1))
    record = model.record(ids, mask, grad=True, statistics=())
    weight = model.attention_module(0).q_proj.weight
    (found,) = torch.autograd.grad(
        hw.attention_divergence(teacher, record, how=how).mean(), weight, retain_graph=True
    )
    assert found.isfinite().all()
    total, real = 0, record.valid.sum(1)
    for layer in record.layers:
        s, t = record.pattern(layer), teacher.pattern(layer)
        logs = torch.where(s > 0, s, 1).log()
        if how == "js":
            m = torch.where(s + t > 0, (s + t) / 2, 1)
            rows = (t * (torch.where(t > 0, t, 1).log() - m.log()) + s * (logs - m.log())) / 2
        else:
            rows = -t * logs
        total = total + (rows.sum((2, 3)) / real[:, None]).mean() / len(record.layers)
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def test_what_does_not_fit_is_said(records):
    teacher, student = records
    other = hw.load(tiny_models.tiny("llama")).record(torch.tensor([[3, 4, 5]]))
    with pytest.raises(RecordError, match="record the same inputs with both"):
        hw.attention_divergence(other, student)
    few = hw.load(tiny_models.tiny("llama")).record(torch.tensor([[3, 4, 5]]), layers=[0])
    with pytest.raises(RecordError, match="which head learns from which"):
        hw.attention_divergence(few, other)
    with pytest.raises(HeadError, match=r"no such head: 7\.0; the teacher"):
        hw.attention_divergence(teacher, student, {"0.0": "7.0"})
    with pytest.raises(RecordError, match="how is one of"):
        hw.attention_divergence(teacher, student, how="cosine")  # type: ignore[arg-type]


def test_records_that_do_not_fit_are_refused():
    model = hw.load("tasks-4l")
    texts = ["Mary gave John a drink", "Mary gave"]
    one, other = model.record(texts), model.record(texts[::-1])
    with pytest.raises(RecordError, match="padded at different places"):
        hw.attention_divergence(one, other)
    with pytest.raises(RecordError, match="the teacher is a record"):
        hw.attention_divergence(None, one)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="heads are names"):
        hw.attention_divergence(one, one, heads=3)  # type: ignore[arg-type]
