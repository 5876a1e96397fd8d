"""The list of analyses for a terminal and for programs, grouped by the question that they answer; it needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict

from headwater.analyses._catalogue.about import Listed, listed, room_questions
from headwater.command.columns import columns

MORE = "headwater analyze NAME --about says what one computes, its settings and its source"


def as_text() -> str:
    """Under each question its analyses, with what they read and the question of each."""
    found = listed().values()
    rows = {each.name: (f"  {each.name}", each.inputs, each.question) for each in found}
    lines = dict(zip(rows, columns([("", "", ""), *rows.values()])[1:], strict=True))
    text: list[str] = []
    for room, question in room_questions().items():
        text += [question, *(lines[each.name] for each in found if each.room == room), ""]
    return "\n".join([*text, MORE])


def as_json() -> str:
    """What each analysis says of itself, in alphabetical order."""
    return json.dumps([_told(each) for each in listed().values()], indent=1)


def _told(each: Listed) -> dict[str, object]:
    return {"name": each.name, "room": each.room, **asdict(each)}
