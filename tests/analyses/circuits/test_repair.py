"""Repair: forced rows against dense runs with the weights replaced by hand, and accuracies counted by hand.

Mutations seen to fail: one of two heads forced, the last position forced in place of the one named, new mistakes
counted as repairs, the forced heads among the random ones, the lowest wrong logit in place of the highest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits.repair import inhibition_like
from headwater.data.prompts.tasks import Example
from headwater.lens.errors import AnalysisError, HeadError


def example(prompt: str, answer: str, wrong: tuple[str, ...], corrupt: str) -> Example:
    return Example("made", "", prompt, answer, wrong, corrupt, None)


EXAMPLES = [
    example("w5 w6 w7 w6 w8", "w5", ("w6", "w9"), "w5 w9 w7 w6 w8"),
    example("w9 w4 w4 w3 w5", "w9", ("w4",), "w9 w4 w6 w3 w5"),
    example("w3 w8 w6", "w8", ("w3",), "w6 w8 w3"),
]
WRONGS, RIGHTS = ([1, 3], [1, 2], [0]), ([0], [0], [1])
IDS = [[5, 6, 7, 6, 8], [9, 4, 4, 3, 5], [3, 8, 6]]


@pytest.mark.parametrize(("name", "position"), [("gpt2", -1), ("llama", 2), ("gemma2", -1), ("gpt_oss", 2)])
def test_the_forced_runs_by_hand(pairs, name: str, position: int) -> None:
    """z of the forced heads is the mean of the values of the wrong tokens, put in by a hook on a run of its own."""
    model = pairs(name).model
    heads = ["0.1", "2.3"]
    found = analyses.repair(
        model, EXAMPLES, heads=heads, position=position, movers="1.0", controls=2, draws=20
    )
    assert found.difference.dims == ("treatment", "batch")
    group = model.n_heads // model.n_kv_heads
    for n, (ids, one) in enumerate(zip(IDS, EXAMPLES, strict=True)):
        query = position % len(ids)
        for treatment, keys in (("none", None), ("forced", WRONGS[n]), ("onto_answer", RIGHTS[n])):
            seen = [k for k in keys or [] if k <= query]
            values: dict[int, torch.Tensor] = {}

            def keep(v, hook, values=values):
                values[int(hook.name.split(".")[1])] = v
                return v

            def put(z, hook, values=values, seen=seen, query=query):
                layer = int(hook.name.split(".")[1])
                for head in (head for head in map(hw.Head.parse, heads) if head.layer == layer):
                    z = z.clone()
                    z[0, query, head.head] = values[layer][0, seen, head.head // group].mean(0)
                return z

            hooks = []
            if seen:
                for layer in (0, 2):
                    hooks += [(f"blocks.{layer}.attn.hook_v", keep), (f"blocks.{layer}.attn.hook_z", put)]
            logits = model.run_with_hooks(torch.tensor([ids]), hooks)[0, -1].double()
            token = int(one.answer[1:])
            expected = logits[token] - max(logits[int(w[1:])] for w in one.wrong)
            mine = found.sel(treatment=treatment)
            assert float(mine.difference[n]) == pytest.approx(float(expected), abs=2e-4)
            assert float(mine.right[n]) == float(logits.argmax() == token)
    np.testing.assert_allclose(
        found.change.sel(of="difference", bound="mean"),
        found.difference.mean("batch") - found.difference.sel(treatment="none").mean("batch"),
        atol=1e-9,
    )


def test_watched_attention_is_that_of_the_run(pairs) -> None:
    """A watched head that is forced too, as the last position's, has all its weight on the wrong tokens."""
    model = pairs("llama").model
    found = analyses.repair(model, EXAMPLES, heads="0.1", movers="0.1, 1.0", controls=1, draws=5)
    forced = found.attention.sel(treatment="forced", mover="0.1")
    np.testing.assert_allclose(forced.sel(on="wrong"), 1, atol=1e-6)
    np.testing.assert_allclose(forced.sel(on="right"), 0, atol=1e-6)
    dense = [pairs("llama").maps(torch.tensor([ids])) for ids in IDS]
    for n in range(3):
        row = dense[n][1, 0, 0, -1]
        plain = found.attention.sel(treatment="none", mover="1.0")[:, n]
        np.testing.assert_allclose(plain, [row[list(WRONGS[n])].sum(), row[list(RIGHTS[n])].sum()], atol=1e-5)
    of_mover = found.attention.sel(mover="1.0")
    change = found.attention_change.sel(treatment="forced", mover="1.0", bound="mean")
    expected = of_mover.sel(treatment="forced") - of_mover.sel(treatment="none")
    np.testing.assert_allclose(change, expected.mean("batch"), atol=1e-9)


def test_what_is_counted_as_repaired_and_as_a_new_mistake() -> None:
    """On the embedded model, whose heads 1.7 at the asked object's token do read the colour: counts by hand."""
    model = hw.load("tasks-4l")
    drawn = hw.prompt_set("colored_conflict", 12, seed=5, model=model)
    found = analyses.repair(model, drawn, heads="1.7", position=-4, controls=1, draws=50)
    right = found.right.values
    before, after = right[0].astype(bool), right[2].astype(bool)
    names = list(found.treatment.values)
    assert names[0] == "none"
    assert names[2] == "onto_answer"
    said = [model.to_strings(model(e.prompt)[0, -1:].argmax(-1))[0].strip() for e in drawn]
    assert before.tolist() == [word == e.answer.strip() for word, e in zip(said, drawn, strict=True)]
    assert float(found.repaired[2]) == pytest.approx((~before & after).mean())
    assert float(found.new_mistakes[2]) == pytest.approx((before & ~after).mean())
    assert float(found.accuracy.sel(treatment="onto_answer", bound="mean")) == pytest.approx(after.mean())
    assert before.mean() < 0.6  # what the set is for: the model errs
    assert (
        found.difference.sel(treatment="onto_answer") > found.difference.sel(treatment="forced")
    ).mean() > 0.7
    again = analyses.repair(model, drawn, heads=["1.7"], position=-4, controls=1, draws=50)
    assert again.identical(found)
    assert not again.identical(
        analyses.repair(model, drawn, heads="1.7", position=-4, controls=1, draws=50, seed=1)
    )


def test_heads_are_found_by_path_patching(pairs) -> None:
    model = pairs("gpt2").model
    heads, movers = inhibition_like(model, EXAMPLES, count=2, movers=2)
    effect = analyses.path_patch(model, EXAMPLES, None).mean("batch").to_series().abs()
    late = [name for name in effect.index if name[0] in "12" and "." in name]
    assert [str(head) for head in movers] == effect[late].nlargest(2).index.tolist()
    assert len(heads) == 2
    assert max(head.layer for head in heads) < max(head.layer for head in movers)
    found = analyses.repair(model, EXAMPLES, controls=1, draws=5, count=1)
    assert found.attrs["heads"] == f'["{inhibition_like(model, EXAMPLES, count=1)[0][0]}"]'
    assert found.sizes["mover"] > 0


def test_pairs_of_plain_texts_and_prompts_without_a_wrong_token(pairs) -> None:
    """The answer is then what the model predicts, so it is always right; without a wrong token nothing is forced."""
    model = pairs("llama").model
    texts = [("w5 w6 w7", "w5 w9 w7"), ("w3 w4", "w8 w4")]
    found = analyses.repair(model, texts, heads="0.0 0.1", controls=1, draws=5)
    assert (found.right.sel(treatment="none") == 1).all()
    told = analyses.repair(model, texts, heads="0.0", answer=["w5", "w3"], wrong="w20", controls=1, draws=5)
    assert told.attrs["untouched"] == 2
    np.testing.assert_allclose(
        told.difference.sel(treatment="forced"), told.difference.sel(treatment="none"), atol=1e-6
    )


def test_refusals(pairs, one_head: hw.HookedModel) -> None:
    model = pairs("gpt2").model
    for settings, message in (
        ({"heads": "9.9"}, r"no such head: 9\.9"), ({"heads": "0.0", "movers": "0.9"}, r"no such head: 0\.9"),
        ({"heads": "0.0", "position": 4}, "position=4, but pair 2 has 3 tokens"),
        ({"heads": "0.0", "controls": 0}, "controls=0"),
    ):  # fmt: skip
        with pytest.raises((AnalysisError, HeadError), match=message) as caught:
            analyses.repair(model, EXAMPLES, **settings)
        assert "\n" not in str(caught.value)
    ids = [(torch.tensor([5, 6, 7]), torch.tensor([5, 9, 7]))]
    found = analyses.repair(one_head, ids, heads="0.0", controls=1, draws=5)  # one prompt has no interval
    assert np.isnan(found.accuracy.sel(bound="low")).all()
    every = [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    alone = analyses.repair(model, EXAMPLES, heads=every, controls=2, draws=5)
    assert np.isnan(alone.right.sel(treatment="random_heads")).all()
    assert np.isfinite(alone.right.sel(treatment="random_keys")).all()
    few = analyses.repair(model, EXAMPLES, heads=every[1:], controls=2, draws=5)  # the one that is left
    one = analyses.repair(model, EXAMPLES, heads="0.0", controls=1, draws=5)
    np.testing.assert_allclose(
        few.difference.sel(treatment="random_heads"), one.difference.sel(treatment="forced"), atol=1e-6
    )
