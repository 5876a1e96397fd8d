"""What no map covers is said by every record and result (`provenance.py`)."""

from __future__ import annotations

import pytest
import torch
from hybrid_models import hybrid

import headwater as hw
from headwater.command import output
from headwater.lens.errors import RecordError
from headwater.lens.loading import zoo
from headwater.lens.models.stack import Mixer
from headwater.lens.records.record import Record

IDS = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
TOLD = "JambaMambaMixer in layers 0 and 2 (model.layers.*.mamba)"


@pytest.fixture(scope="module")
def jamba():
    return hw.load(hybrid("jamba"))


def test_a_record_keeps_the_mixers_when_it_is_saved(jamba, tmp_path):
    record = jamba.record(IDS)
    opened = Record.open(record.save(tmp_path / "r.safetensors"))
    mixers = tuple(Mixer(n, f"model.layers.{n}.mamba", "JambaMambaMixer") for n in (0, 2))
    for told in (record, opened):
        assert told.mixers == mixers
        assert told.provenance["not_covered"] == [TOLD]
        assert told.statistic("entropy").attrs["not_covered"] == TOLD
        assert f"not covered by any map: {TOLD}" in output.summary(told)


def test_results_of_records_and_of_models_name_them(jamba):
    for found in (
        hw.analyses.sink_rate(jamba.record(IDS)),
        hw.analyses.input_x_gradient(jamba, IDS, answer="#5"),
        hw.analyses.circuit_rank(jamba),
    ):
        assert found.attrs["not_covered"] == TOLD
        assert f"not covered by any map: {TOLD}" in output.as_text(found)
    assert TOLD in repr(jamba)


def test_a_plain_model_has_no_such_attribute():
    model = hw.load("tasks-4l")
    record = model.record("When Mary and John went to the store")
    assert record.mixers == ()
    assert "not_covered" not in hw.analyses.rollout(record).attrs
    assert "not covered" not in repr(model)


def test_a_record_whose_mixers_are_malformed_is_refused(jamba):
    record = jamba.record(IDS)
    record.provenance["mixers"] = [["zero"]]
    with pytest.raises(RecordError, match="mixers should be"):
        _ = record.mixers


def test_cross_attention_beside_a_decoder_is_said_with_its_products():
    model = hw.load(zoo.build("t5"))
    record = model.record(IDS, decoder_input_ids=IDS)
    told = "T5Attention in layers 0 and 1 (decoder.block.*.layer.*.EncDecAttention)"
    assert hw.analyses.rollout(record).attrs["other_attention"] == told
    assert "other_attention" not in hw.analyses.rollout(record.part("encoder")).attrs
