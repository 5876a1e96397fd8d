"""Pairs in every form in which they may be given are the same pairs, in every analysis that takes them.

Mutations seen to fail: the sides of a tuple of lists taken for pairs, an example's prompts exchanged, corrupt dropped.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import small_tokenizers
import tiny_models
import torch
from patch_pairs import ANSWER, CLEAN, CORRUPT, WRONG

import headwater as hw
from headwater import analyses
from headwater.analyses._prompts.pairs import pairs_of, side_by_side
from headwater.data.prompts.tasks import Example
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo

TEXTS = ["w5 w6 w7", "w9 w4 w4 w3"], ["w5 w9 w7", "w9 w4 w6 w3"]
SETS = [
    Example("made", "", clean, "w5", ("w6",), corrupt, None) for clean, corrupt in zip(*TEXTS, strict=True)
]


def ids(model: hw.HookedModel, clean: Any, corrupt: Any = None) -> list[list[list[int]]]:
    groups = pairs_of(model, side_by_side(model, clean, corrupt))
    return [[each.clean.tolist(), each.corrupt.tolist()] for each in groups]


def test_every_form_gives_the_same_pairs(pairs) -> None:
    model = pairs("gpt2").model
    listed = list(zip(*TEXTS, strict=True))
    expected = ids(model, listed)
    assert expected == [[[[5, 6, 7]], [[5, 9, 7]]], [[[9, 4, 4, 3]], [[9, 4, 6, 3]]]]
    assert ids(model, *TEXTS) == expected
    assert ids(model, SETS) == expected
    assert (
        ids(model, tuple(SETS))
        == ids(model, tuple(listed))
        == ids(model, [list(one) for one in listed])
        == expected
    )
    assert ids(model, zip(*TEXTS, strict=True)) == expected
    three = [side + side[:1] for side in TEXTS]
    assert ids(model, tuple(three)) == ids(model, *three)  # two lists of three are no pairs of two
    for one in (SETS[0], listed[0], listed[:1], ([TEXTS[0][0]], [TEXTS[1][0]])):
        assert ids(model, one) == expected[:1]
    assert ids(model, TEXTS[0][0], TEXTS[1][0]) == expected[:1]
    tensors = ids(model, CLEAN, CORRUPT)
    assert tensors == [[CLEAN.tolist(), CORRUPT.tolist()]]
    assert ids(model, torch.stack([CLEAN, CORRUPT], 1)) == ids(model, (CLEAN, CORRUPT)) == tensors
    assert ids(model, (CLEAN[0], CORRUPT[0])) == [[CLEAN[:1].tolist(), CORRUPT[:1].tolist()]]


def test_a_side_of_a_pair_may_be_a_conversation_and_nothing_else() -> None:
    talks = small_tokenizers.words("<bos> $A", "<bos> $A <eos> $B", chat_template=small_tokenizers.CHAT)
    model = hw.load(tiny_models.tiny("llama"), talks)
    clean, corrupt = ([{"role": "user", "content": words}] for words in ("w5 w6", "w5 w7"))
    expected = [[[[1, 3, 5, 6]], [[1, 3, 5, 7]]]]
    for given in ([(clean, corrupt)], (clean, corrupt), [[clean, corrupt]]):
        assert ids(model, given) == expected
    assert ids(model, clean, corrupt) == ids(model, [clean], [corrupt]) == expected
    assert ids(model, [(("w5", "w6"), ("w5", "w7"))]) == [[[[1, 5, 2, 6]], [[1, 5, 2, 7]]]]
    for side in (3.5, None, {"role": "user"}, [clean], torch.ones(1, 2).long()):
        with pytest.raises(AnalysisError, match=r"pair 0 holds .*; a side of a pair is one text"):
            pairs_of(model, [(side, side)])
    typed = small_tokenizers.words(
        "<bos> $A", "<bos> $A <eos> $B:1", model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    (found,) = pairs_of(hw.load(tiny_models.tiny("bert"), typed), [(("w5", "w6"), ("w5", "w7"))])
    assert found.corrupt.more["token_type_ids"].tolist() == [[0, 0, 0, 1]]
    assert found.first == 3


def test_pairs_of_pictures_and_of_two_sided_texts() -> None:
    vit, clip, t5 = (hw.load(zoo.build(name)) for name in ("vit_classifier", "clip", "t5"))
    pixels = torch.randn(2, 2, 3, zoo.IMAGE, zoo.IMAGE)
    (found,) = pairs_of(vit, side_by_side(vit, pixels[0], pixels[1]))
    assert torch.equal(found.corrupt.more["pixel_values"], pixels[1])
    assert (found.first, found.positions(vit)) == (0, found.length)
    text = torch.arange(4, 11)[None].repeat(2, 1)
    both = [clip.to_tokens(text, pixel_values=side) for side in pixels]  # one text, two pictures
    (found,) = pairs_of(clip, side_by_side(clip, *both))
    assert found.positions(clip.part("vision")) == (zoo.IMAGE // zoo.PATCH) ** 2 + 1
    assert (found.length, found.positions(clip), found.first) == (7, 7, 0)
    sides = [
        t5.to_tokens(torch.arange(4, 4 + n)[None], decoder_input_ids=torch.tensor([[0, 5]])) for n in (5, 6)
    ]
    with pytest.raises(AnalysisError, match="pair 0 has 5 clean and 6 corrupt encoder's tokens"):
        pairs_of(t5, [tuple(sides)])
    (found,) = pairs_of(t5, [(sides[0], sides[0])])
    assert [found.positions(t5.part(name)) for name in ("encoder", "decoder", "cross")] == [5, 2, 2]


NAMES = [name for name, entry in analyses.catalogue().items() if entry.inputs == "model+pairs"]
SLOW = ("attribution_truth",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_every_analysis_takes_two_lists_and_pairs(pairs, name: str) -> None:
    """Forms differ in nothing but how they are written."""
    model, function = pairs("gpt2").model, getattr(analyses, name)
    known = inspect.signature(function).parameters
    own = name == "align_subspace"  # half of its pairs judge, and its `heads` goes with what="head"
    clean, corrupt = (side.repeat(2 if own else 1, 1) for side in (CLEAN, CORRUPT))
    few: dict[str, Any] = {"steps": 2, "draws": 2, "controls": 1, "heads": "1.0", "tau": 9.0}
    few |= {"answer": ANSWER * (len(clean) // 2), "wrong": WRONG, **({"what": "head"} if own else {})}
    asked = {key: value for key, value in few.items() if key in known}
    first = (None,) if "graph" in known else ()
    both = [
        function(model, *first, *given, **asked)
        for given in ((clean, corrupt), (list(zip(clean, corrupt, strict=True)),))
    ]
    if hasattr(both[0], "equals"):
        assert both[0].equals(both[1])
    else:  # a graph
        assert dict(both[0].edges) == dict(both[1].edges)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["w5"],), "corrupt is missing"),
        ((CLEAN,), "corrupt is missing"),
        ("w5", "corrupt is missing"),
        (({"clean": ["w5"], "corrupt": ["w6"]},), "corrupt is missing"),
        ((SETS, ["w5"]), "clean holds pairs, and corrupt prompts are given too"),
        ((["w5"], SETS), "corrupt holds pairs, and clean prompts are given too"),
        ((SETS, "logit_difference"), "a measure stands in the place of the corrupt prompts"),
        ((SETS, lambda logits: logits), "a measure stands in the place of the corrupt prompts"),
        ((TEXTS[:2],), "may be two pairs or two clean and two corrupt prompts"),
        ((["w5"], ["w6", "w7"]), "1 clean and 2 corrupt"),
        (([("w5", "w6"), "w7"],), "pair 1 is not"),
        (([CLEAN[0, :2], CORRUPT[0, :2]],), "pair 0 is not"),
    ],
)
def test_mix_ups_get_the_mend(pairs, given, message: str) -> None:
    model = pairs("gpt2").model
    with pytest.raises(AnalysisError, match=message):
        ids(model, *((given,) if isinstance(given, str) else given))
