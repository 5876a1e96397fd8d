"""docs/claims.md: every figure of the README has a row, and every row is true of the page and of the file it names.

Seen to fail with a figure put into the README, a number changed there and in its row, a quotation that no page
has, a finding changed on the page of real models, a file that does not exist, a path that leads nowhere, and a date
that is not the file's.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headwater.analyses._catalogue.catalogue import catalogue
from headwater.lens.loading import coverage
from headwater.lens.trained.registry import TRAINED

ROOT = Path(__file__).parents[1]
STATES = ("holds", "refuted", "not measured")
NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?"
WORD = r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|sixty|half)"
UNIT = (
    r"(?:%|×|(?:ms|s|seconds?|minutes?|hours?|[KMG]i?B|times|percent)\b"
    r"|(?:architectures|families|analyses|edits|recipes)\b)"
)
FIGURE = re.compile(
    rf"(?:{NUMBER}|{WORD})(?:(?: to | and |–)(?:{NUMBER}|{WORD[2:]}))?(?:\s?{UNIT})", re.IGNORECASE
)
EQUATION = re.compile(r"^([\d.,]+) = (.+)$")
COUNTS = {
    "architectures": lambda: len(coverage.zoo.FAMILIES),
    "analyses": lambda: len(catalogue()),
    **{f"megabytes of {name}": lambda each=each: each.download / 1e6 for name, each in TRAINED.items()},
    **{f"megabytes on disk of {name}": lambda each=each: each.disk / 1e6 for name, each in TRAINED.items()},
}


@dataclass(frozen=True)
class Claim:
    """One row: the words as they stand on the page, and what shows them."""

    quote: str
    page: str
    shown_by: str
    when: str
    state: str

    @property
    def code(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.shown_by)


@functools.cache
def plain(page: str) -> str:
    """A page as one line of text without marks, and without its programs."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", text.replace("**", "").replace("`", ""))


def claims() -> list[Claim]:
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]
    return [Claim(*row) for row in cells if row[0] != "claim"]


CLAIMS = claims()


def test_every_figure_of_the_readme_has_a_row() -> None:
    text = plain("README.md")
    covered = [
        range(text.index(claim.quote), text.index(claim.quote) + len(claim.quote))
        for claim in CLAIMS
        if claim.page == "README.md" and claim.quote in text
    ]
    figures = list(FIGURE.finditer(text))
    assert len(figures) > 20
    missing = [
        f"…{text[max(0, figure.start() - 40) : figure.end() + 20]}…"
        for figure in figures
        if not any(figure.start() in span and figure.end() - 1 in span for span in covered)
    ]
    assert missing == [], "without a row in docs/claims.md"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.quote[:50])
def test_a_row_is_true_of_its_page_and_its_file(claim: Claim) -> None:
    assert plain(claim.page).count(claim.quote) == 1, "the quotation stands once on its page"
    assert claim.state in STATES
    assert claim.state == "not measured" or re.match(r"\d{4}-\d\d-\d\d", claim.when)
    source: Any = None
    stated: list[str] = []
    for code in claim.code:
        if "=" in code and (found := EQUATION.match(code)):
            stated.append(found[1])
            assert found[1] in claim.quote, f"{found[1]} is not in the claim"
            assert rounded(found[1], value(found[2], source)), code
        elif "/" in code and " " not in code:
            assert (ROOT / code).exists(), code
            if code.endswith(".json"):
                source = json.loads((ROOT / code).read_text(encoding="utf-8"))
                assert claim.when[:10] == source["date"][:10], "the date is the file's"
    if source is not None:
        told = {number for figure in FIGURE.findall(claim.quote) for number in re.findall(NUMBER, figure)}
        assert told <= set(stated), "figures without a path in the file"


def value(expression: str, source: Any) -> float:
    """A count by its name, a path into the file, or one path divided by another or by a number."""
    if expression in COUNTS:
        return COUNTS[expression]()
    above, *below = expression.split(" / ")
    number = at(above, source)
    for each in below:
        number /= at(each, source)
    return number


def at(path: str, source: Any) -> float:
    """`a.b[key=x,other=y].c`: by name, or the one element of a list that reads so; [2] counts, [mlp.3] is a name."""
    if re.fullmatch(r"[\d.e]+", path):
        return float(path)
    for name, chosen in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        if name:
            source = source[name]
        elif "=" in chosen:
            wanted = dict(each.split("=") for each in chosen.split(","))
            [source] = [
                item for item in source if all(str(item[key]) == text for key, text in wanted.items())
            ]
        else:
            source = source[int(chosen) if isinstance(source, list) else chosen]
    return float(source)


def rounded(stated: str, found: float) -> bool:
    """Whether a number is the found one, rounded as far as it is written."""
    digits = len(stated.partition(".")[2])
    return abs(float(stated.replace(",", "")) - found) <= 0.5 * 10**-digits * (1 + 1e-9)


def sections() -> dict[str, str]:
    """The sections of docs/real-models.md that name an example whose numbers lie in docs/real, by that example."""
    text = (ROOT / "docs" / "real-models.md").read_text(encoding="utf-8")
    named = {
        found[1]: section
        for section in re.split(r"^## ", text, flags=re.MULTILINE)
        if (found := re.search(r"`examples/(real_\w+)\.py`", section))
    }
    return {name: text for name, text in named.items() if (ROOT / "docs" / "real" / f"{name}.json").exists()}


def numbers_in(found: Any) -> list[float]:
    if isinstance(found, dict):
        return [number for each in found.items() for part in each for number in numbers_in(part)]
    if isinstance(found, list):
        return [number for each in found for number in numbers_in(each)]
    if isinstance(found, str):
        return [float(text) for text in re.findall(r"\d+\.\d+", found)]
    return [float(found)] if isinstance(found, int | float) else []


@pytest.mark.parametrize("name", sections())
def test_the_decimals_of_a_real_model_are_in_its_file(name: str) -> None:
    """As written, or as a percentage; what a paper found is written without decimals or in quotation marks."""
    known = {
        abs(scale * number)
        for file in (ROOT / "docs" / "real").glob("*.json")
        if f"`examples/{file.stem}.py`" in sections()[name]
        for number in numbers_in(json.loads(file.read_text(encoding="utf-8")))
        for scale in (1, 100)
    }
    text = re.sub(r'"[^"]*"|arXiv \S+', "", sections()[name])
    stated = re.findall(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.]*\.\w)", text)
    assert stated
    assert [each for each in stated if not any(rounded(each, number) for number in known)] == []
