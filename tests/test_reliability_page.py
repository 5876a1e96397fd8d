"""docs/reliability.md: its counts are those of the two scripts, and each fault has a test that is there.

Seen to fail with a count changed on the page, and with the name of a test that is none.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
SWEEPS = json.loads((ROOT / "benchmarks" / "results" / "sweeps.json").read_text(encoding="utf-8"))
COUNTS = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text(encoding="utf-8"))


def of_part(part: str, key: str) -> dict[str, int]:
    return {name: each[key] for name, each in COUNTS.get(part, {}).items() if isinstance(each, dict)}


def of_tenths(each: dict[str, Any]) -> str:
    memory = ", ".join(f"{size:,}" for size in each["memory_mb"])
    ledger = (
        f"; the ledger took {each['commit_ms']} ms for a change, {each['slow_commit_ms']} ms for one in a hundred"
        if "commit_ms" in each
        else ""
    )
    return f"the most memory in each tenth of that: {memory} MB{ledger}"


def rows() -> list[str]:
    """The table of counts as the file has them."""
    found = [
        f"| processes killed at random moments: {name} | {count} | 0 |"
        for name, count in of_part("kills", "kills").items()
    ]
    if drivers := SWEEPS.get("kills"):
        told = f"drivers of a sweep with two workers killed at random moments, {drivers['units']:,} units"
        found.append(f"| {told} | {drivers['kills']} | {drivers['left_over']} |")
    found += [
        f"| Ctrl-C at random moments of `headwater {name}` | {count} | 0 |"
        for name, count in of_part("interrupts", "interrupts").items()
    ]
    for seconds in sorted(set(of_part("fuzz", "seconds").values())):
        inputs = {
            name: count
            for name, count in of_part("fuzz", "inputs").items()
            if COUNTS["fuzz"][name]["seconds"] == seconds
        }
        each = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in inputs.items())
        told = f"files changed at random, {seconds} s for each kind: {each}"
        found.append(f"| {told} | {sum(inputs.values()):,} | 0 |")
    if passes := COUNTS.get("forwards"):
        told = f"forward passes in {passes['threads']} threads under {passes['edits']} kinds of edits"
        found.append(f"| {told} | {passes['forwards']:,} | {passes['contaminated']} |")
    for name, each in COUNTS.get("soak", {}).items():
        if isinstance(each, dict):
            told = f"{name}, one after the other in {each['seconds']} s; {of_tenths(each)}"
            found.append(f"| {told} | {each['count']:,} | 0 |")
    if seen := COUNTS.get("visitors"):
        told = (
            f"pages seen by {seen['visitors']} visitors of one dashboard in {seen['seconds'] / 60:g} minutes, each "
            f"under edits of its own; the most memory that the server took in each minute: "
            f"{', '.join(f'{each:,}' for each in seen['memory_mb'])} MB"
        )
        found.append(f"| {told} | {seen['pages']:,} | {seen['wrong'] + seen['failed']} |")
    return found


def test_counts_are_those_of_the_script() -> None:
    table = PAGE.partition("## Counts")[2].partition("|---|")[2].partition("\n\n")[0].splitlines()[1:]
    assert table == rows()


def test_every_kind_was_counted() -> None:
    import fuzz_targets
    import interrupts
    import kills

    assert set(of_part("fuzz", "inputs")) == set(fuzz_targets.TARGETS)
    assert set(of_part("kills", "kills")) == set(kills.WORKS)
    assert set(of_part("interrupts", "interrupts")) == set(interrupts.COMMANDS)


def test_memory_levelled_off_under_visitors() -> None:
    import many_visitors

    seen = COUNTS["visitors"]
    assert seen["level"]
    assert len(seen["memory_mb"]) == seen["seconds"] / 60 == 10
    assert many_visitors.is_level(seen["memory_mb"])
    assert not many_visitors.is_level([700 + 50 * minute for minute in range(10)])


def test_every_fault_has_a_test_that_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)` \|$", PAGE, re.MULTILINE)
    table = [line for line in PAGE.partition("## Faults")[2].splitlines() if line.startswith("| ")]
    assert len(named) == len(table) - 1
    for file, test in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), (file, test)


if __name__ == "__main__":  # the table, to be put on the page
    print("\n".join(rows()))
