"""The record of a generated text is the one of a single run over the finished text.

Seen to fail with keys taken from the first columns instead of the rows' own, with `argmax` not moved by a sliding
cache's offset, with rows behind the end of a text left in the sums, with edits not compared from step to step, and
with the statistics of the first of the layers that are measured together for all of them.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.kernels.maps import statistics as kernel
from headwater.lens.errors import RecordError
from headwater.lens.records import held_maps
from headwater.lens.records.generation_recorder import GenerationRecorder

EDITS = (
    hw.Redistribute([0], 0.2),
    hw.TowardIdentity(0.1, layers=1),
    hw.Knockout([4], [1]),
    hw.Temperature(1.5),
    hw.ScaleHeads({"1.1": 0.5}),
)


NAMES = tuple(kernel.NAMES)


def left_padded(lengths=(9, 5), seed=3):
    ids, _ = tiny_models.batch(seed, (max(lengths),) * len(lengths))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return ids, mask


@pytest.mark.parametrize("name", tiny_models.CAUSAL)
@pytest.mark.parametrize("edits", [(), EDITS], ids=["plain", "edited"])
def test_the_record_is_that_of_one_run_over_the_whole_text(name, edits, tmp_path):
    model = hw.load(tiny_models.tiny(name))
    ids, mask = left_padded()
    groups = {"start": [0], "generated": "generated"}
    settings = {"statistics": NAMES, "keep": ("qkv", "residual")}
    with model.edit(*edits):
        output, record = model.generate(ids, 8, mask, record=True, groups=groups, **settings)
        path = tmp_path / "text.safetensors"
        again = model.generate(
            ids, 8, mask, record=True, groups=groups, keep_on="disk", path=path, **settings
        ).record
        groups = {"start": [0], "generated": slice(-8, None)}
        whole = model.record(output, record.valid.long(), groups=groups, **settings)
    assert record.tokens.equal(output)
    assert record.valid[:, :9].equal(mask.bool())
    for statistic in NAMES:
        torch.testing.assert_close(
            record.statistics[statistic], whole.statistics[statistic], rtol=1e-4, atol=1e-5, equal_nan=True
        )
    real = record.valid
    for layer in record.layers:
        torch.testing.assert_close(record.pattern(layer), whole.pattern(layer), rtol=1e-4, atol=1e-5)
        columns = torch.ones(output.shape[1], 1)
        torch.testing.assert_close(
            record.map(layer).T @ columns, whole.map(layer).T @ columns, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            record.residual(layer)[real], whole.residual(layer)[real], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            record.values[layer].movedim(1, 2)[real],
            whole.values[layer].movedim(1, 2)[real],
            rtol=1e-4,
            atol=1e-4,
        )
        assert again.pattern(layer).equal(record.pattern(layer))
        assert again.residual(layer).equal(record.residual(layer))
    assert hw.Record.open(path, verify=True).to_xarray().identical(record.to_xarray())
    assert list(tmp_path.iterdir()) == [path], "nothing else is left in the folder"


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(
    "edits", [(), (hw.Redistribute([0], 0.2), hw.Knockout([7], [1]))], ids=["plain", "edited"]
)
def test_a_prompt_that_is_read_in_chunks_has_the_record_of_one_pass(name, edits, monkeypatch):
    sizes = []
    take = GenerationRecorder.take
    monkeypatch.setattr(GenerationRecorder, "take", lambda *a: (sizes.append(a[2].shape[2]), take(*a)))
    model = hw.load(tiny_models.tiny(name))
    ids, _ = tiny_models.batch(2, (13, 13))
    with model.edit(*edits):
        output, record = model.generate(ids, 4, record=True, statistics=kernel.DEFAULT, prefill_chunk_size=5)
        whole = model.record(output)
    assert list(dict.fromkeys(sizes)) == [5, 3, 1]
    for statistic in kernel.DEFAULT:
        torch.testing.assert_close(
            record.statistics[statistic], whole.statistics[statistic], rtol=1e-4, atol=1e-5, equal_nan=True
        )
    for layer in record.layers:
        torch.testing.assert_close(record.pattern(layer), whole.pattern(layer), rtol=1e-4, atol=1e-5)


def test_a_row_whose_text_has_ended_takes_no_part(tmp_path):
    model = hw.load(tiny_models.tiny("llama"))
    ids, mask = left_padded()
    plain = model.generate(ids, 8, mask, eos_token_id=None)
    end = int(plain[0, 10])  # the second new token of row 0 becomes the end of a text
    assert end not in plain[1, 9:].tolist(), "the other row goes on"
    output, record = model.generate(ids, 8, mask, record=True, eos_token_id=end, pad_token_id=0)
    assert record.valid[0].tolist() == [True] * 11 + [False] * 6
    assert record.valid[1, 5:].all()
    whole = model.record(output, record.valid.long())
    for name in record.statistics:
        torch.testing.assert_close(
            record.statistics[name], whole.statistics[name], rtol=1e-4, atol=1e-5, equal_nan=True
        )
    assert record.statistic("entropy").values[0, :, :, 11:].size
    assert torch.tensor(record.statistic("entropy").values[0, :, :, 11:]).isnan().all()


@pytest.mark.parametrize("prompt", [1, 9])
def test_one_token_of_prompt_and_one_new_token(prompt):
    model = hw.load(tiny_models.tiny("mistral"))
    ids = torch.randint(3, 97, (1, prompt), generator=torch.Generator().manual_seed(0))
    output, record = model.generate(ids, 1, record=True)
    assert record.tokens.equal(output)
    torch.testing.assert_close(record.pattern(2), model.record(output).pattern(2), rtol=1e-4, atol=1e-5)


def test_edits_that_move_while_generating_are_refused_by_name_where_maps_are_kept():
    model = hw.load(tiny_models.tiny("gpt2"))
    ids, _ = tiny_models.batch(1, (6,))
    with model.edit(hw.Knockout([-1], [0])):
        with pytest.raises(
            RecordError, match=r"Knockout: an edit means something else in each step.*keep=\(\)"
        ):
            model.generate(ids, 4, record=True)
        record = model.generate(ids, 4, record=True, keep=(), statistics=("first",)).record
    # every new row was the last one when it was read: none of them sees the first token
    assert record.statistic("first").values[0, :, :, 5:].max() == 0
    assert record.statistic("first").values[0, :, :, 1:5].min() > 0
    assert model.edits == ()


def test_layers_whose_steps_wait_are_measured_together(monkeypatch):
    model = hw.load(tiny_models.tiny("llama"))
    ids = tiny_models.batch(3, (7,))[0]
    measured, compute = [], kernel.compute

    def told(map, *given):
        measured.append(map.shape)
        return compute(map, *given)

    monkeypatch.setattr(held_maps, "STEPS", 4)
    monkeypatch.setattr(kernel, "compute", told)
    output, record = model.generate(
        ids, 10, record=True, min_new_tokens=10, statistics=NAMES[:-1], keep="qkv"
    )
    heads = model.n_layers * model.n_heads
    # the prompt; 10 steps, four and four and two of them: each once, and not once for every layer
    assert measured == [(1, heads, 7, 7), (1, heads, 4, 11), (1, heads, 4, 15), (1, heads, 2, 17)]
    whole = model.record(output, statistics=NAMES[:-1], keep="qkv")
    for name in NAMES[:-1]:
        torch.testing.assert_close(
            record.statistics[name], whole.statistics[name], rtol=1e-4, atol=1e-5, equal_nan=True
        )
    for layer in record.layers:
        torch.testing.assert_close(record.pattern(layer), whole.pattern(layer), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(record.values[layer], whole.values[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", range(tiny_models.LAYERS))
def test_scores_that_overflow_end_a_generation_at_their_step(layer):
    """Seen to fail where steps wait for each other: it then went on to the end of the text."""
    hf = tiny_models.tiny("llama")
    model = hw.load(hf)
    ids, _ = tiny_models.batch(3, (9,))
    passes = []

    def spoil(module, args, output):
        passes.append(output.shape[1])
        return output * torch.nan if len(passes) == 4 else output

    with (
        hf.model.layers[layer].self_attn.q_proj.register_forward_hook(spoil),
        pytest.raises(
            RecordError, match=rf"NaN or infinite, first in head {layer}\.0 at batch 0, position 11"
        ),
    ):
        model.generate(ids, max_new_tokens=20, min_new_tokens=20, record=True)
    assert len(passes) == 4
