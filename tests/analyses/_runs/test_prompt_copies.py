"""Patching that leaves out early positions, lower layers and logits nobody reads, against patching that runs all.

Models are in float64, so that both ways agree to what is left of rounding. Mutations seen to fail: a run begun one
position late, the position that is read not moved with the window, logits of the window alone given to a measure of all
positions, a cell's place not moved, what was tried taken for good.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from patch_pairs import ANSWER, CLEAN, WRONG
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.analyses._measures.pair_scores import Asked
from headwater.analyses._prompts.pairs import Pairs
from headwater.analyses._runs import prompt_copies
from headwater.analyses._runs.prompt_copies import Copies
from headwater.lens.errors import AnalysisError
from headwater.lens.running import prefix_cache

KINDS = ("head", "head_position", "residual", "mlp", "q", "k", "v", "pattern", "destination_source")
CASES = [  # the first position that differs, in which pairs, and which side is changed
    (0, (0, 1), "denoise"),
    (3, (0,), "noise"),
    (5, (0, 1), "denoise"),
]


@pytest.fixture(scope="module")
def exact(pairs: Callable) -> Callable[[str], hw.HookedModel]:
    known: dict[str, hw.HookedModel] = {}

    def get(name: str) -> hw.HookedModel:
        if name not in known:
            known[name] = hw.load(copy.deepcopy(pairs(name).twin).float())
            known[
                name
            ].hf.double()  # only now: eager attention makes NaN of padding behind a window in float64
        return known[name]

    return get


def corrupt_at(first: int, rows: tuple[int, ...] = (0, 1)) -> Tensor:
    found = CLEAN.clone()
    found[list(rows), first] += 20
    return found


def together(corrupt: Tensor) -> Pairs:
    return Pairs(CLEAN, corrupt, [0, 1])


def whole(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], Any]) -> Any:
    """The same without a shorter way: every copy runs every position of every layer, and gives every logit."""
    with monkeypatch.context() as patched:
        patched.setattr(Copies, "_tried", lambda self: self)
        made = Copies.__init__

        def plain(self: Copies, *given: Any, **named: Any) -> None:
            named |= {"past": [], "tokens": None, "resuming": prompt_copies.Resuming(given[0].layers)}
            made(self, *given, **named)

        patched.setattr(Copies, "__init__", plain)
        return ask()


def near(found: Any, expected: Any) -> None:
    most = (
        1e-5 if found.attrs.get("what") in ("pattern", "destination_source") else 1e-9
    )  # maps are in float32
    assert found.attrs["undefined"] == expected.attrs["undefined"]
    np.testing.assert_allclose(found.values, expected.values, atol=most, rtol=most)
    np.testing.assert_allclose(found.coords["clean"], expected.coords["clean"], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_what_is_left_out_changes_nothing(exact: Callable, monkeypatch, name: str, what: str) -> None:
    model = exact(name)
    for first, rows, how in CASES:
        corrupt = corrupt_at(first, rows)

        def ask(corrupt: Tensor = corrupt, how: str = how) -> Any:
            return analyses.patch(
                model, CLEAN, corrupt, what=what, how=how, answer=ANSWER, wrong=WRONG,
                per="kv_head" if what in "kv" else None,
            )  # fmt: skip

        near(ask(), whole(monkeypatch, ask))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_other_things_in_the_cells_place(exact: Callable, monkeypatch, name: str) -> None:
    """Nothing and the mean change every position, but a cell of one position none before it."""
    model, corrupt = exact(name), corrupt_at(3)
    for what in ("head", "residual", "head_position", "destination_source"):
        for ablation, how in (("zero", "noise"), ("mean", "denoise")):
            given = {"what": what, "ablation": ablation, "how": how, "answer": ANSWER, "wrong": WRONG}
            near(
                analyses.patch(model, CLEAN, corrupt, **given),
                whole(monkeypatch, lambda given=given: analyses.patch(model, CLEAN, corrupt, **given)),
            )


def test_a_measure_may_read_every_position(exact: Callable, monkeypatch) -> None:
    model, corrupt = exact("gpt2"), corrupt_at(2)

    def measure(logits: Tensor) -> Tensor:
        assert logits.shape[1:] == (6, model.vocab)
        return logits.log_softmax(-1)[..., 11].sum(1)

    begun, _ = Copies.of(model, together(corrupt), Asked(measure, None, None, -1), "denoise")
    assert (len(begun.past), begun.tokens, begun.window(2)) == (3, None, slice(2, 6))
    for what in ("head", "residual"):
        near(
            analyses.patch(model, CLEAN, corrupt, measure, what=what),
            whole(monkeypatch, lambda what=what: analyses.patch(model, CLEAN, corrupt, measure, what=what)),
        )


@pytest.mark.parametrize("what", ["head", "residual", "pattern", "k"])
def test_nothing_is_read_behind_the_position(exact: Callable, monkeypatch, what: str) -> None:
    model, corrupt = exact("gpt2"), corrupt_at(1)
    for position in (1, 3):
        given = {"what": what, "position": position, "answer": ANSWER, "wrong": WRONG}
        found = analyses.patch(model, CLEAN, corrupt, **given)
        near(found, whole(monkeypatch, lambda given=given: analyses.patch(model, CLEAN, corrupt, **given)))
        if what == "residual":
            np.testing.assert_array_equal(found.values[:, :, position + 1 :], 0)
    early = analyses.patch(model, CLEAN, corrupt, what=what, position=0, answer=ANSWER, wrong=WRONG)
    assert np.isnan(early.values).all()
    assert early.attrs["undefined"] == 2


def test_prompts_that_differ_nowhere(exact: Callable) -> None:
    for analysis in (analyses.patch, analyses.path_patch):
        found = analysis(exact("llama"), CLEAN, CLEAN)
        assert np.isnan(found.values).all()
        assert found.attrs["undefined"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_path_patching_that_leaves_out_the_same(exact: Callable, monkeypatch, name: str) -> None:
    model, corrupt = exact(name), corrupt_at(3)
    for receivers, how, mlps, ablation in (
        ("logits", "noise", "free", "resample"), ("2.1.k, 1.0.v", "denoise", "frozen", "resample"),
        ("residual.2", "noise", "free", "mean"), ("2.3.q", "denoise", "free", "resample"),
    ):  # fmt: skip
        given = {"receivers": receivers, "how": how, "mlps": mlps, "ablation": ablation, "per": "kv_head"}
        given |= {"answer": ANSWER, "wrong": WRONG}
        near(
            analyses.path_patch(model, CLEAN, corrupt, **given),
            whole(monkeypatch, lambda given=given: analyses.path_patch(model, CLEAN, corrupt, **given)),
        )


@pytest.fixture
def tokens_run() -> Iterator[Callable[[hw.HookedModel], list[int]]]:
    handles = []

    def of(model: hw.HookedModel) -> list[int]:
        seen: list[int] = []
        table = model.hf.get_input_embeddings()
        handles.append(table.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel())))
        return seen

    yield of
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_what_is_left_out(exact: Callable, tokens_run: Callable, name: str) -> None:
    """Every kind of model here begins in the middle, at a layer and a position, and gives the logits that are read."""
    model = exact(name)
    asked = Asked("logit_difference", ANSWER, WRONG, -1)
    found, _ = Copies.of(model, together(corrupt_at(4)), asked, "noise")
    assert (len(found.past), len(found.resuming.outputs), len(found.tokens)) == (3, 3, 4)  # type: ignore[arg-type]
    assert (found.first, found.stop, found.window(4)) == (4, 6, slice(4, 6))
    given = {"layers": [0], "answer": ANSWER, "wrong": WRONG}
    analyses.patch(
        model, CLEAN, corrupt_at(4), **given
    )  # what is found out about a model once is not counted
    seen = tokens_run(model)
    analyses.patch(model, CLEAN, corrupt_at(4), **given)
    sides, tried, cells = 2 * 2 * 6, 2 * (2 * 2 * 3), 4 * (2 * 2)  # what is tried begins in the middle
    assert sum(seen) == sides + tried + cells


@pytest.mark.parametrize("edited", [False, True])
def test_what_does_not_hold_is_not_used(exact: Callable, monkeypatch, edited: bool) -> None:
    model, corrupt = exact("gpt2"), corrupt_at(3)
    given = {"what": "head", "answer": ANSWER, "wrong": WRONG}
    with model.edit(*[hw.ScaleHeads({"1.1": 0.5})] * edited):
        expected = whole(monkeypatch, lambda: analyses.patch(model, CLEAN, corrupt, **given))
        if not edited:  # keys that are not those of the prompts
            filled = prefix_cache.filled

            def wrong(*named: Any) -> prefix_cache.KeysValues:
                return [(keys + 1, values) for keys, values in filled(*named)]

            monkeypatch.setattr(prefix_cache, "filled", wrong)
        asked = Asked("logit_difference", ANSWER, WRONG, -1)
        found, _ = Copies.of(model, together(corrupt), asked, "denoise")
        assert not found.past
        assert found.window(3) == slice(0, 6)
        near(analyses.patch(model, CLEAN, corrupt, **given), expected)


def test_examples_and_pairs_in_the_place_of_two_lists(pairs: Callable) -> None:
    model = pairs("gpt2").model
    examples = [
        SimpleNamespace(prompt="w5 w17 w30", corrupt="w5 w22 w30", answer="w11", wrong=("w20", "w3")),
        SimpleNamespace(prompt="w5 w9 w3 w8", corrupt="w5 w9 w4 w8", answer="w12", wrong=("w45",)),
    ]
    sides = [[getattr(each, name) for each in examples] for name in ("prompt", "corrupt")]
    for analysis in (analyses.patch, analyses.path_patch):
        expected = analysis(model, *sides, answer=["w11", "w12"], wrong=["w20", "w45"])
        np.testing.assert_array_equal(analysis(model, examples, None).values, expected.values)
        both = analysis(model, [*zip(*sides, strict=True)], None, answer="w11", wrong="w20")
        np.testing.assert_array_equal(both.values[0], expected.values[0])
        told = analysis(model, examples, None, answer="w30")  # what is given comes first
        assert told.attrs["answer"] == "w30"
        assert not np.allclose(told.values, expected.values)
    for message, given in (
        ("corrupt is missing", "w5 w17"), ("corrupt is missing", ["w5 w17"]), ("pair 1 is not", [("w5", "w6"), 3]),
        ("pairs is empty", []),
    ):  # fmt: skip
        with pytest.raises(AnalysisError, match=message):
            analyses.patch(model, given, None)
