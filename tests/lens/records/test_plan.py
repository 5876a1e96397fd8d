"""What a record may be asked for, and what is refused before anything runs."""

from __future__ import annotations

import pytest
import tiny_models

import headwater as hw
from headwater.lens.errors import HeadError, RecordError


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("gpt2"))


def test_settings_of_a_record_that_make_no_sense(model):
    ids, _ = tiny_models.batch()
    with pytest.raises(RecordError, match="unknown statistic 'entropie': did you mean 'entropy'"):
        model.record(ids, statistics=("entropie",))
    with pytest.raises(RecordError, match="keep must be"):
        model.record(ids, keep=("qq",))
    with pytest.raises(RecordError, match="'mass' needs groups"):
        model.record(ids, statistics=("mass",))
    with pytest.raises(HeadError, match="no attention in layer 9"):
        model.record(ids, layers=[9])
    record = model.record(ids, layers=[1])
    with pytest.raises(HeadError, match="layer 0 is not in the record"):
        record.pattern(0)
    with pytest.raises(HeadError, match=r"no such head: 1.4"):
        record.pattern(1, 4)
    with pytest.raises(RecordError, match="no position 17 in 17"):
        record.pattern(1, 0, queries=17)
    with pytest.raises(RecordError, match="did you mean 'received'"):
        record.statistic("recieved")
