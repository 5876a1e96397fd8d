"""What an analysis reads, a record or a model with texts, held to what it needs before a number is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headwater.analyses._catalogue.about import Inputs, Maps
from headwater.lens.errors import AnalysisError
from headwater.lens.models.opened import Opened
from headwater.lens.records.record import Record

READ_CROSS = "raw_attention, sink_rate or reference_frames, which read cross-attention"
THROUGH = ("rollout", "flow", "flow_graph")  # follow cross-attention together with both stacks beside it
TEXTS = {
    "examples": "texts, or rows of token ids", "pairs": "pairs of texts, such as [(clean, corrupt)]",
    "clean": "texts, or rows of token ids", "corrupt": "texts, or rows of token ids",
}  # fmt: skip
NO_TEXT = (Opened, Record, nn.Module, type(None), bool, int, float)


def check_call(
    name: str, inputs: Inputs, maps: Maps, signature: inspect.Signature, args: tuple, kwargs: Mapping[str, Any]
) -> None:  # fmt: skip
    """AnalysisError where a call of the analysis `name` lacks an input, or has one of another kind than it reads."""
    parameters = signature.parameters.values()
    given = dict(zip(signature.parameters, args, strict=False)) | dict(kwargs)
    first, *others = signature.parameters
    if inputs == "record":
        _check_record(name, maps, given.get(first))
    elif inputs != "circuits":
        _check_model(name, given.get(first))
    for each in others:
        if each in TEXTS and each in given and isinstance(given[each], NO_TEXT):
            if given[each] is None and signature.parameters[each].default is None:
                continue
            raise AnalysisError(f"{name} takes {TEXTS[each]}, as {each}; got {_what(given[each])}")
    single = (each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    missing = [each.name for each in single if each.default is each.empty and each.name not in given]
    if missing:
        wanted = [f"{each} ({TEXTS[each]})" if each in TEXTS else each for each in missing]
        raise AnalysisError(
            f"{name} also needs {' and '.join(wanted)}; give {name}({first}, {', '.join(missing)})"
        )


def _check_record(name: str, maps: Maps, given: Any) -> None:
    if not isinstance(given, Record):
        raise AnalysisError(f"{name} takes a record; got {_what(given)}; {_record_from(name, given)}")
    if maps == "square" and given.keys is not None:
        if name in THROUGH:
            raise AnalysisError(
                f"{name} multiplies maps from layer to layer, and cross-attention leads from one stack into another; "
                f"give the whole record, as in {name}(model.record(…)), which is followed through both"
            )
        raise AnalysisError(
            f"{name} needs queries and keys that are the same tokens, and this record is of "
            f"{given.provenance.get('part', 'cross')!r}, whose queries look at other tokens; give the record of "
            f"another part, or use {READ_CROSS}"
        )


def _check_model(name: str, given: Any) -> None:
    if isinstance(given, Opened):
        return
    mend = "give what hw.load(…) returns"
    if isinstance(given, nn.Module):
        mend = "give hw.load(model)"
    elif isinstance(given, Record):
        mend = f"it runs the model, so give that: {name}(model, …)"
    raise AnalysisError(f"{name} takes a model; got {_what(given)}; {mend}")


def _record_from(name: str, given: Any) -> str:
    if isinstance(given, Opened):
        return f"give model.record(prompt), as in {name}(model.record(prompt))"
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith(".safetensors")):
        return f"give hw.Record.open({str(given)!r})"
    if isinstance(given, tuple) and any(isinstance(each, Record) for each in given):
        return "give its record: output, record = model.generate(prompt, record=True)"
    return "give what model.record(prompt) returns"


def _what(given: Any) -> str:
    if given is None:
        return "None"
    kinds = (
        (Opened, "a model"),
        (Record, "a record"),
        (str, "a text"),
        (Path, "a path"),
        (Tensor, "a tensor"),
    )
    kind = next((words for type_, words in kinds if isinstance(given, type_)), "")
    return kind or f"an object of {type(given).__name__}"
