"""What every edit has: rows, JSON and Python that read back as the same edit, and refusals in one line.

Seen to fail: rows ignored.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
import torch
from every_edit import SERIAL

import headwater as hw
from headwater.lens.edits import EDITS
from headwater.lens.errors import EditError


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def edited(model, ids, edit, mask=None, **groups):
    with model.edit(edit, **groups):
        return model(ids, mask)


@pytest.mark.parametrize("edit", SERIAL, ids=lambda e: type(e).__name__)
def test_every_edit_survives_json_and_python(edit):
    read = hw.edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert read == edit
    assert hash(read) == hash(edit)
    assert eval(edit.to_python(), {"hw": hw}) == edit
    assert read.to_python() == edit.to_python()
    if hasattr(edit, "rows"):
        assert dataclasses.replace(edit, rows=[7]) != edit
        assert "rows=[7]" in dataclasses.replace(edit, rows=[7]).to_python()


def test_files_of_older_versions_say_how_heads_are_ablated():
    old = {"edit": "AblateHeads", "heads": ["0.1"], "how": "mean", "examples": ["a b"]}
    assert hw.edit_from_dict(old) == hw.AblateHeads(["0.1"], ablation="mean", examples=["a b"])
    with pytest.raises(EditError, match="AblateHeads has no setting 'how'"):
        hw.edit_from_dict({**old, "ablation": "zero"})


def test_every_edit_is_public_and_has_been_written_down():
    assert {type(edit) for edit in SERIAL} == set(EDITS.values())
    assert all(getattr(hw, name) is kind for name, kind in EDITS.items())


def test_rows_let_a_batch_run_many_variants(model):
    ids, _ = tiny_models.batch(6, (9,))
    edits = [hw.ScaleHeads({"1.1": 0.0}), hw.TowardUniform(0.5), hw.BiasKeys([0], 3.0), hw.AblateHeads("0.2"),
             hw.OffsetHeads({"2.2": [1.0] * 8}), hw.InjectPattern("previous", 0.7),
             hw.EditResidual(1, "add", [0.3] * 32),
             hw.Knockout(-1, [0]), hw.StreamingWindow(1, 2)]  # fmt: skip
    alone = torch.cat([edited(model, ids, edit) for edit in edits])
    with model.edit(*(dataclasses.replace(edit, rows=row) for row, edit in enumerate(edits))):
        together = model(ids.expand(len(edits), -1))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with (
        model.edit(hw.TowardUniform(0.5, rows=[4])),
        pytest.raises(EditError, match="no batch row 4 in a batch of 1"),
    ):
        model(ids)


WRONG = [
    (
        lambda: hw.ScaleHeads({"9.0": 0.0, "1.7": 0.0}),
        "no such head: 9.0, 1.7; the model has layers 0 to 2",
    ),
    (lambda: hw.ScaleHeads({"2-3": 0.0}), "written 'layer.head'"),
    (lambda: hw.ScaleHeads({"1.1": float("nan")}), "finite number; got nan"),
    (lambda: hw.ScaleHeads([("1.1", 0)]), "takes a mapping"),
    (lambda: hw.Redistribute([0], keep=-0.5), "keep must be between 0 and 1"),
    (lambda: hw.Redistribute([0], to="all"), "'others' or positions"),
    (lambda: hw.Redistribute([0, 1], to=[1, 2]), "positions \\[1\\] are both"),
    (lambda: hw.Redistribute("sinks"), "got 'sinks'"),
    (lambda: hw.Redistribute([0.5]), "whole numbers"),
    (lambda: hw.TowardIdentity(1.5), "between 0 and 1; got 1.5"),
    (lambda: hw.Temperature("hot"), "got 'hot'"),
    (lambda: hw.Knockout([0], [1], layers=7), "no attention in layer 7"),
    (lambda: hw.AblateHeads("1.1", ablation="median"), "'zero', 'mean' or 'resample'"),
    (lambda: hw.AblateHeads("1.1", ablation="mean"), "needs examples="),
    (lambda: "ScaleHeads", "model.edit takes edits"),
    (lambda: hw.OffsetHeads({"1.1": [1.0] * 7}), "offset of head 1.1 must be 8 finite numbers"),
    (lambda: hw.OffsetHeads({"1.1": [float("nan")] * 8}), "NaN or infinite"),
    (lambda: hw.OffsetHeads(["1.1"]), "takes a mapping"),
    (lambda: hw.TowardUniform(-0.1), "amount must be between 0 and 1; got -0.1"),
    (lambda: hw.InjectPattern("previos"), "did you mean 'previous'"),
    (lambda: hw.InjectPattern([[1.0, -1.0]]), "not negative"),
    (lambda: hw.InjectPattern([1.0, 2.0]), "weights are .query, key."),
    (lambda: hw.InjectPattern(torch.ones(3, 2, 2)), ".4 heads, query, key.; got .3, 2, 2."),
    (lambda: hw.InjectPattern({"tokens": [1]}), "'keys': positions"),
    (lambda: hw.InjectPattern(lambda: 1), "a pattern is a name, a rule, a record"),
    (lambda: hw.Normaliser("softmx"), "Normaliser: unknown normaliser 'softmx'"),
    (lambda: hw.Normaliser("sinkhorn", iterations=2), "odd number of iterations"),
    (lambda: hw.Normaliser("sinkhorn"), "for bidirectional attention, .* LlamaForCausalLM is causal"),
    (lambda: hw.BiasKeys("tokn:Mary", 1.0), "'tokn:Mary' is no name; write 'token:Mary'"),
    (lambda: hw.BiasKeys("images", 1.0), "did you mean 'image'"),
    (lambda: hw.BiasKeys("image", 1.0), "LlamaForCausalLM has no image tokens"),
    (lambda: hw.BiasKeys("sinks:spectre", 1.0), "found by the rules share, act, massive; got"),
    (lambda: hw.BiasKeys("sinks:gu:0.3", 1.0), "share on a text's first 64 tokens; write 'sinks:share'"),
    (lambda: hw.BiasKeys("sinks:spectral", 1.0), "find them once with find_sinks.record, rule='spectral'"),
    (lambda: hw.BiasKeys("sinks:massive:-1", 1.0), "is not a number above 0"),
    (lambda: hw.BiasKeys("sinks:act:much", 1.0), "is not a number above 0"),
    (lambda: hw.BiasKeys("", 1.0), "got ''"),
    (lambda: hw.BiasKeys({1: 2}, 1.0), "got {1: 2}"),
    (lambda: hw.BiasKeys([1], 1.0, rows="some"), "rows are 'all', a batch row"),
    (lambda: hw.MoveAttention("others", "others"), "can not both be 'others'"),
    (lambda: hw.HeadMix(pre=[[1.0]]), "pre is .4 heads, 4 heads.; got .1, 1."),
    (lambda: hw.HeadMix(post=np.full((4, 4), np.nan)), "post holds NaN"),
    (lambda: hw.HeadMix(convolution=np.ones((3, 2, 2))), ".4 heads, back, wide., at most 65 each; got .3, 2, 2."),
    (lambda: hw.HeadMix(convolution=np.ones((2, 66))), "at most 65 each"),
    (lambda: hw.HeadMix(pre="mean"), "got 'mean'"),
    (lambda: hw.ScaleWeights([0], float("inf")), "factor must be a finite number; got inf"),
    (lambda: hw.MoveAttention([0, 1], [1, 2]), "positions .1. are both"),
    (lambda: hw.Redistribute([0], where={"of": [1]}), "where is a mapping with of, within, most, least"),
    (lambda: hw.StreamingWindow(4, 0), "window must be a whole number, 1 or more; got 0"),
    (lambda: hw.GroupedAttention(0), "size must be a whole number"),
    (lambda: hw.MaskPairs({"kind": "window"}), "unknown kind 'window': did you mean 'windows'"),
    (lambda: hw.MaskPairs({}), "unknown kind None: it is one of dilated"),
    (lambda: hw.MaskPairs({"kind": "moba", "size": 2}), "moba needs top"),
    (lambda: hw.MaskPairs({"kind": "moba", "size": 2, "top": 1, "k": 1}), "moba takes size, top; got 'k'"),
    (lambda: hw.MaskPairs({"kind": "moba", "size": 0, "top": 1}), "size must be a whole number, 1 or more; got 0"),
    (lambda: hw.MaskPairs({"kind": "near", "grid": [2, 3], "reach": [1]}), "one whole number, or 2 of them"),
    (lambda: hw.MaskPairs({"kind": "near", "grid": 4, "reach": 1}), "grid is the sizes of the axes"),
    (lambda: hw.MaskPairs({"kind": "near", "grid": [4096, 8192], "reach": 1}), "at most 16777216 cells"),
    (lambda: hw.MaskPairs({"kind": "neighbourhood", "grid": [4], "size": 3, "step": 2}), "does not fit into 4"),
    (lambda: hw.MaskPairs({"kind": "tree", "documents": [[0, 2]], "parents": [0]}), "is an earlier one or None"),
    (lambda: hw.MaskPairs({"kind": "tree", "documents": [[0, 2], [1, 3]], "parents": [None] * 2}), "do not overlap"),
    (lambda: hw.MaskPairs({"kind": "blocks", "size": 2, "shown": [[9**9]]}), "are too many; take larger blocks"),
    (lambda: hw.MaskPairs([[1.0, 0.0]]), "bool .query, key.; got float64"),
    (lambda: hw.MaskPairs(np.ones((2, 3, 3), bool)), ".4 heads, query, key.; got .2, 3, 3."),
    (lambda: hw.MaskPairs(np.ones((2048, 2049), bool)), "too large to write down"),
    (lambda: hw.MaskPairs("dilated"), "rule is a mapping with a kind"),
    (lambda: hw.HeavyHitters(2.5, 3), "heavy must be a whole number"),
    (lambda: hw.FreezeAttention(3), "takes a record or the path of one"),
    (lambda: hw.FreezeAttention("/nowhere/run.safetensors"), "there is no file"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_a_wrong_edit_is_refused_in_one_line(model, make, message):
    with pytest.raises(hw.HeadwaterError, match=message) as caught:
        model.edit(make())
    assert "\n" not in str(caught.value)


def test_a_position_beyond_the_prompt_is_refused():
    model = hw.load(tiny_models.tiny("gpt2"))
    with model.edit(hw.Redistribute([9])):
        with pytest.raises(EditError, match="no position 9 in a prompt of 4 tokens"):
            model(torch.tensor([[5, 6, 7, 8]]))
        model.generate(torch.tensor([[5, 6, 7, 8]]), 8)  # there the position comes later


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"edit": "ScaleHead", "factors": {}}, "did you mean 'ScaleHeads'"),
        ({"edit": "Temperature"}, "needs tau"),
        ({"edit": "Temperature", "tau": 1, "hads": "all"}, "did you mean 'heads'"),
        ([], "an edit is an object"),
        ({"tau": 1}, "an edit is an object"),
    ],
)
def test_a_malformed_edit_file_is_refused(data, message):
    with pytest.raises(EditError, match=message):
        hw.edit_from_dict(data)
