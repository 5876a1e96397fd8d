"""What is read in the text of the files is what the imported functions say.

Seen to fail with a default value miscounted, and with the settings of the decorator left out.
"""

from __future__ import annotations

from pathlib import Path

from headwater.analyses._catalogue import about
from headwater.analyses._catalogue.about import files, inputs_of, listed, room_questions
from headwater.analyses._catalogue.catalogue import catalogue


def test_the_text_says_what_the_functions_say() -> None:
    for name, entry in catalogue().items():
        assert {**vars(listed()[name])} == {field: getattr(entry, field) for field in vars(listed()[name])}
    assert list(listed()) == list(catalogue())


def test_every_room_has_its_question() -> None:
    folder = Path(about.__file__).parents[1]
    assert set(room_questions()) >= {file.parent.name for file in files().values()}
    assert set(room_questions()) == {path.name for path in folder.glob("[!_]*/")}
    assert all(question.endswith("?") for question in room_questions().values())


def test_what_an_analysis_reads_follows_from_its_parameters() -> None:
    assert inputs_of({"record": False, "queries": True}) == "record"
    assert inputs_of({"model": False}) == inputs_of({"model": False, "draws": True}) == "model"
    assert inputs_of({"model": False, "examples": False, "draws": True}) == "model+examples"
    assert inputs_of({"model": False, "graph": False, "pairs": True}) == "model+pairs"
    assert inputs_of({"model": False, "clean": False, "corrupt": False}) == "model+pairs"
    assert inputs_of({"first": False, "second": False}) == "circuits"
