"""The table in docs/models.md is what the command measures, and no architecture does worse than it says there.

Its models are those of `zoo.py`: `zoo_decoders.py`, `zoo_hybrids.py` and `zoo_towers.py` on
the sizes of `zoo_shapes.py`; those of `zoo_forms.py` are measured by `coverage_forms.py`.

Seen to fail: generation with a static cache refused (a mask that is no tensor), the
padding of the encoder left out of cross-attention, edits that prepare to nothing, a page whose numbers are a tenth of
what they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.command import architectures
from headwater.lens.errors import HeadwaterError
from headwater.lens.loading import coverage

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
FLOOR = 1e-6  # below it float32 sums in another order


def as_number(cell: str) -> float | None:
    return None if cell == "–" else float(cell)


@pytest.mark.slow
@pytest.mark.parametrize("name", coverage.names())
def test_no_architecture_does_worse_than_the_page_says(name):
    row = coverage.measure(name)
    assert row.faults == []
    assert "not installed" not in row.refusal, "a row of the page was not measured"
    stated, found = architectures.read(PAGE.read_text(encoding="utf-8"))[row.title], architectures.cells(row)
    assert (stated[0], stated[1], stated[-1]) == (found[0], found[1], found[-1])
    for heading, old, new in zip(architectures.HEADINGS[2:8], stated[2:8], found[2:8], strict=True):
        if "refused" in (old, new):
            assert old == new, heading
            continue
        before, now = as_number(old), as_number(new)
        assert (before is None) == (now is None), heading
        assert before is None or now is None or now <= max(3 * before, FLOOR), heading
    assert [cell == "refused" for cell in stated[8:10]] == [cell == "refused" for cell in found[8:10]]


def test_the_page_lists_what_is_measured_and_nothing_else():
    stated = list(architectures.read(PAGE.read_text(encoding="utf-8")))
    families = [family.title for family in coverage.zoo.KNOWN.values()]
    assert stated[: len(families)] == families
    assert all(title.endswith("(trained)") for title in stated[len(families) :])


def test_a_page_keeps_what_stands_around_its_table(tmp_path):
    row = coverage.Row("X", "XModel", "text 1×1", plain=2e-7, maps=0.0, attention_edit=0.5, head_edit=20.0)
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{architectures.BEGIN}\n| old |\n{architectures.END}\n\nafter\n")
    architectures.write(page, [row])
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nafter\n")
    assert "| old |" not in text
    assert architectures.read(text)["X"][2:] == ["2e-7", "–", "–", "–", "–", "0", "5e-1", "20", "works"]
    page.write_text("no marks")
    with pytest.raises(HeadwaterError, match="no place for the table"):
        architectures.write(page, [row])


def test_an_edit_without_effect_and_an_empty_recording_are_faults(monkeypatch):
    monkeypatch.setattr(coverage, "MOVED", 1e9)
    assert coverage.measure("llama").faults == [
        "attention edit: changes nothing", "head edit: changes nothing",
    ]  # fmt: skip
    monkeypatch.setattr(coverage, "attentions", lambda model, given: {"text": (), "vision": ()})
    assert any(fault.startswith("maps") for fault in coverage.measure("llama").faults)
