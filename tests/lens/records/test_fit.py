"""A record whose axes, maps and labels are not of one length is refused, when it is made and when it is opened.

Seen to fail without the call of `misfit` in `Recorder.put`, and of `refuse_misfit` in `open_record`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny

import headwater as hw
from headwater.lens.errors import RecordError
from headwater.lens.records import fit
from headwater.lens.records.contents import Axis

IDS = torch.arange(3, 9)[None]


@pytest.fixture(scope="module")
def record() -> hw.Record:
    return hw.load(tiny("llama")).record(IDS, keep=("qkv", "residual"), groups={"first": 0})


def but(record: hw.Record, **fields: Any) -> hw.Record:
    """The record with other fields, past the checks of its types."""
    found = copy.copy(record)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found


def changed(record: hw.Record) -> dict[str, Any]:
    """Records in each of which one thing is longer than the tokens."""
    longer = [[*row, "one more"] for row in record.strings]
    more = torch.cat([record.tokens, record.tokens[:, :1]], 1)
    valid = torch.ones_like(more, dtype=torch.bool)
    axis = Axis(more, valid, longer)
    return {
        "labels": but(record, strings=longer), "padding": but(record, valid=valid),
        "all but maps": but(record, tokens=more, valid=valid, strings=longer), "keys": but(record, keys=axis),
        "rows": but(record, tokens=record.tokens.repeat(2, 1), valid=record.valid.repeat(2, 1),
                        strings=record.strings * 2),
        "heads": but(record, n_heads=record.n_heads + 1),
        "values": but(record, values={0: record.values[0][:, :, 1:]}),
        "groups": but(record, groups={"first": valid}),
        "stream": but(record, residuals={0: record.residuals[0][:, 1:]}),
    }  # fmt: skip


def test_what_does_not_fit_is_named_and_not_opened(record: hw.Record, tmp_path: Path) -> None:
    fit.refuse_misfit(record)
    for name, wrong in changed(record).items():
        with pytest.raises(ValueError, match=r"^(queries|layer|the group|the stream|1 rows|2 rows)"):
            fit.refuse_misfit(wrong)
        path = wrong.save(tmp_path / f"{name}.safetensors")
        with pytest.raises(RecordError, match=r"is not a well-formed record \((ValueError|TypeCheckError)"):
            hw.Record.open(path)


def test_a_run_whose_maps_are_not_of_the_tokens_is_refused() -> None:
    """A module that adds a position of its own, as learned prefixes do."""
    hf: Any = tiny("llama")
    model = hw.load(hf)
    inner = hf.model.embed_tokens.forward
    hf.model.embed_tokens.forward = lambda ids: torch.cat([inner(ids[:, :1]), inner(ids)], 1)
    with pytest.raises(
        RecordError, match=r"layer 0 of .* gave maps of 1 × 4 heads × 7 queries × 7 keys, not .* 6 q"
    ):
        model.record(IDS)
    with pytest.raises(RecordError, match=r"gave the statistic 'entropy' as \[1, 4, 7\], not \[1, 4, 6\]"):
        model.record(IDS, keep=(), statistics="entropy")
