"""Suppressors of the last layer against float64 runs of the eager twin; planted ones are found and mitigated.

Mutations seen to fail: the token read from the last stream; parts chosen on all texts; controls among the suppressors;
a one-sided sign test; the MLP's edit left out; the mean of all logits forgotten; `least` ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import dense_patching
import numpy as np
import pytest
import recall_oracle
import torch
import transformers as hf
import xarray as xr
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.analyses._prompts.examples import batches_of
from headwater.analyses.logits.suppressors import _judged, mitigation
from headwater.lens.errors import AnalysisError

COUNT = 26
IDS = torch.randint(3, 61, (COUNT, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("against", ["mean", "nothing"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_shares_against_a_dense_run(pairs: Callable, name: str, against: str) -> None:
    pair = pairs(name)
    found = analyses.suppressors(pair.model, IDS, against=against, draws=100)
    seen = recall_oracle.ends(pair.twin, IDS)
    with torch.no_grad():
        before = (seen.norm(seen.entering[-1]) @ seen.unembed.T).argmax(-1)
    assert found.token.values.tolist() == before.tolist()
    along = seen.against_mean(before) if against == "mean" else seen.along(seen.unembed[before])
    heads = torch.einsum("phd,pd->ph", seen.heads[-1], along)
    np.testing.assert_allclose(found.share[:, :4], heads, atol=1e-4)
    np.testing.assert_allclose(found.share.sel(component="mlp.2"), (seen.mlp[-1] * along).sum(-1), atol=1e-4)
    rest = seen.last - seen.entering[-1] - seen.mlp[-1] - seen.heads[-1].sum(1)
    np.testing.assert_allclose(found.share.sel(component="bias.2"), (rest * along).sum(-1), atol=1e-4)
    chosen = found.side.values == "chosen on"
    assert abs(chosen.sum() - COUNT / 2) <= 1
    part = found.share.values[chosen]
    np.testing.assert_allclose(found["mean"], part.mean(0))
    np.testing.assert_allclose(found.negative, (part < 0).mean(0))
    for p, below, above in zip(found.p.values, (part < 0).sum(0), (part > 0).sum(0), strict=True):
        signs = int(below + above)  # a bias that is 0 has none
        tail = sum(math.comb(signs, k) for k in range(min(below, above) + 1))
        np.testing.assert_allclose(p, min(1, 2 * tail / 2**signs))
    assert (found.p < 1).sum() > 1
    ordered, count = np.sort(found.p.values), found.sizes["component"]
    holm = np.maximum.accumulate(ordered * np.arange(count, 0, -1)).clip(max=1)
    np.testing.assert_allclose(np.sort(found.p_corrected), holm)
    expected = (
        (found.high < 0)
        & (found["mean"] <= -0.01)
        & (found.p_corrected < 0.05)
        & (found.component != "bias.2")
    )
    assert found.suppressor.values.tolist() == expected.values.tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_measures_of_the_scaled_model(pairs: Callable, name: str) -> None:
    """Random models have no suppressors, so the sets that are scaled are given to the step that measures."""
    pair = pairs(name)
    answers = torch.randint(3, 61, (COUNT,), generator=torch.Generator().manual_seed(2))
    answers[:13] = pair.model(IDS[:13])[:, -1].argmax(-1)  # so that some are right
    rows = list(range(1, COUNT, 2))
    members = {"all": ["2.0", "2.3", "mlp.2"], "2.1": ["2.1"], "mlp.2": ["mlp.2"]}
    places = dict(enumerate(answers.tolist()))
    batches = batches_of(pair.model, IDS, 8)
    found = _judged(pair.model, batches, places, rows, members, [0.25, 1.0, 2.0], -1)
    for n, names in enumerate([[], *members.values()]):
        for m, factor in enumerate([0.25, 1.0, 2.0]):
            if not names and m:
                continue

            def change(kind: str, layer: int, tensor: Tensor, names=names, factor=factor) -> Tensor:
                if layer == 2 and kind == "z":
                    scale = torch.tensor([factor if f"2.{h}" in names else 1.0 for h in range(4)])
                    return tensor * scale[:, None]
                return tensor * factor if layer == 2 and kind == "mlp" and "mlp.2" in names else tensor

            logits = dense_patching.visited(pair.twin, IDS[rows], change)[:, -1]
            right = answers[rows]
            log = logits.log_softmax(-1)[range(len(rows)), right]
            expected = torch.stack([
                (logits.argmax(-1) == right).double(), log.exp(), logits[range(len(rows)), right], -log
            ])  # fmt: skip
            np.testing.assert_allclose(found[:, :, n, m], expected, atol=2e-4)
    np.testing.assert_array_equal(found[:, :, 1:, 1], np.repeat(found[:, :, :1, 0], 3, 2))  # a factor of 1


def planted(part: str, strength: float = 40.0) -> hf.GPT2LMHeadModel:
    """Two layers; head 1 of the last, or its MLP, writes the negative of what the logits are read from.

    Coordinates 0 to 7 hold what is read; the other heads write a little noise elsewhere.
    """
    torch.manual_seed(4)
    config = hf.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False,
        initializer_range=0.2, activation_function="linear", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).eval()
    last = model.transformer.h[1]
    with torch.no_grad():
        model.lm_head.weight[:, 8:] = 0
        # no mean, which the final norm would take from the other coordinates
        model.lm_head.weight[:, :8] -= model.lm_head.weight[:, :8].mean(1, keepdim=True)
        for weight in (last.attn.c_proj.weight, last.mlp.c_proj.weight):
            weight[:, :8] = 0
            weight.mul_(0.01)
        if part == "head":
            last.attn.c_attn.weight[:, 64 + 8 : 64 + 16] = torch.eye(32)[:, :8]
            last.attn.c_proj.weight[8:16, :8] = -strength * torch.eye(8)
        else:
            last.mlp.c_fc.weight[:, :8] = torch.eye(32)[:, :8]
            last.mlp.c_proj.weight[:8, :8] = -strength * torch.eye(8)
    return model


@pytest.mark.parametrize(("part", "name"), [("head", "1.1"), ("mlp", "mlp.1")])
def test_a_planted_suppressor_is_found_and_mitigated(part: str, name: str) -> None:
    """On texts of one token a head looks at that token alone. Without the part the last layer changes nothing that is
    read, so the answer is the likeliest token before the layer."""
    model = hw.load(planted(part))
    texts = torch.arange(3, 61)[:, None]
    first = analyses.suppressors(model, texts, draws=100)
    answers = [f"#{n}" for n in first.token.values]
    found = analyses.suppressors(model, texts, answers, factors=(0.0, 1.0), controls=2, draws=100)
    assert found.component.values[found.suppressor.values].tolist() == [name]
    assert float(found.negative.sel(component=name)) == 1
    assert found.scaled.values.tolist() == [name, "control 0", "control 1"]
    assert float(found.base.sel(measure="accuracy").mean()) == 0
    at = found.sel(scaled=name, factor=0.0)
    assert float(at.change.sel(measure="accuracy")) == 1
    assert float(at.change_high.sel(measure="loss")) < -1
    assert float(at.change_low.sel(measure="probability")) > 0.03
    for control in ("control 0", "control 1"):
        assert json.loads(found.attrs["members"])[control][0] != name
        beside = found.change.sel(scaled=control, factor=0.0)
        assert float(beside.sel(measure="accuracy")) == 0
        assert abs(float(beside.sel(measure="loss"))) < 0.1
    edits = [
        hw.edit_from_dict(json.loads(json.dumps(edit.to_dict()))) for edit in mitigation(found, name, 0.0)
    ]
    rows = texts[found.judged.values.tolist()]
    with model.edit(*edits):
        logits = model(rows)[:, -1].double()
    expected = logits.gather(1, torch.tensor(found.token.sel(batch=found.judged).values.tolist())[:, None])[
        :, 0
    ]
    np.testing.assert_allclose(at.value.sel(measure="logit"), expected, atol=1e-5)


def test_controls_are_as_many_other_heads() -> None:
    """Two of four heads speak against the token, so each control is the other two."""
    plain = planted("head")
    last = plain.transformer.h[1].attn
    with torch.no_grad():
        last.c_attn.weight[:, 64 + 24 : 64 + 32] = torch.eye(32)[:, :8]
        last.c_proj.weight[24:32, :8] = -3 * torch.eye(8)
    model, texts = hw.load(plain), torch.arange(3, 61)[:, None]
    found = analyses.suppressors(model, texts, controls=2, draws=100)
    members = json.loads(found.attrs["members"])
    assert members == {
        "1.1": ["1.1"], "1.3": ["1.3"], "together": ["1.1", "1.3"],
        "control 0": ["1.0", "1.2"], "control 1": ["1.0", "1.2"],
    }  # fmt: skip
    assert mitigation(found) == [hw.ScaleHeads({"1.1": 0.5, "1.3": 0.5})]
    neutral = found.sel(factor=1.0)
    assert (neutral.value == found.base).all()
    for name in ("change", "change_low", "change_high"):
        assert (neutral[name] == 0).all()
    assert analyses.suppressors(model, texts, controls=2, draws=100).identical(found)
    repeated = analyses.suppressors(model, torch.cat([texts, texts[:5]]), controls=2, draws=100)
    np.testing.assert_allclose(repeated.share, found.share, rtol=1e-4, atol=1e-5)
    few = analyses.suppressors(model, texts, least=1e6, draws=100)
    assert not few.suppressor.any()


def test_none_and_wrong_settings(pairs: Callable, tmp_path: Path) -> None:
    model = pairs("llama").model
    found = analyses.suppressors(model, ["w5 w6", "w7"], draws=100)
    assert not found.suppressor.any()
    assert found.value.sizes == {"scaled": 0, "measure": 4, "judged": 1, "factor": 3}
    assert found.change.sizes == {"scaled": 0, "measure": 4, "factor": 3}
    found.to_netcdf(tmp_path / "none.nc", engine="scipy")
    assert xr.load_dataset(tmp_path / "none.nc", engine="scipy").sizes == found.sizes
    with pytest.raises(AnalysisError, match="no set 'together' was scaled; there are none"):
        mitigation(found)
    for given, message in (
        ({"factors": (0.5, float("nan"))}, "are not different numbers"),
        ({"factors": "half"}, "factors='half' are not different numbers"),
        ({"factors": ()}, "are not different numbers"),
        ({"against": "wrong"}, "against='wrong' is unknown"),
    ):
        with pytest.raises(AnalysisError, match=message) as caught:
            analyses.suppressors(model, IDS, **given)
        assert "\n" not in str(caught.value)
    with pytest.raises(AnalysisError, match="can not be put into two halves"):
        analyses.suppressors(model, IDS[:1])
    with pytest.raises(AnalysisError, match="is no sum of what its parts add"):
        analyses.suppressors(pairs("bert").model, IDS)
