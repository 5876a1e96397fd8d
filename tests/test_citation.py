"""CITATION.cff is what the Citation File Format 1.2 asks for, and says what the package says.

Seen to fail without a title, with a field that the format does not know, and with another version.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import yaml

FILE = Path(__file__).parents[1] / "CITATION.cff"
REQUIRED = {"cff-version", "message", "title", "authors"}
OPTIONAL = {
    "type", "version", "license", "abstract", "keywords", "date-released", "doi", "identifiers", "contact", "url",
    "repository", "repository-code", "repository-artifact", "commit", "references", "preferred-citation", "license-url",
}  # fmt: skip


def test_it_is_valid_and_of_this_version() -> None:
    told = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    assert set(told) >= REQUIRED
    assert set(told) <= REQUIRED | OPTIONAL
    assert told["cff-version"] == "1.2.0"
    assert all(set(author) <= {"name", "website", "email"} and author["name"] for author in told["authors"])
    assert (told["type"], told["license"], told["version"]) == ("software", "MIT", version("headwater"))
    assert all(isinstance(word, str) and word for word in told["keywords"])
