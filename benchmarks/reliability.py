"""What docs/reliability.md says: kills, interrupts, changed files, passes in threads, long work and visitors, counted.

`python benchmarks/reliability.py [kills interrupts fuzz forwards soak visitors] [--kills 20] [--interrupts 20]
[--fuzz-seconds 60] [--kinds record…] [--forwards 10000] [--soak 10000] [--visitors 20] [--seconds 600]`; results go to
benchmarks/results/reliability.json part by part, so that a run that was stopped loses one part. A part whose promise
does not hold ends the run with nothing written of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
MOST_KB = 1.0  # of memory that each piece of long work may add
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}


def printed(script: str, *arguments: object, **more: str) -> list[dict[str, Any]]:
    """What a script of tests/support prints, a line of JSON each."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / script, *map(str, arguments)], cwd=ROOT,
        stdout=subprocess.PIPE, text=True, env=os.environ | QUIET | more, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def by_name(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {line.pop("name"): line for line in lines}


def measured(part: str, given: argparse.Namespace) -> dict[str, Any]:
    if part == "kills":
        return by_name(printed("kills.py", "all", given.kills))
    if part == "interrupts":
        return by_name(printed("interrupts.py", given.interrupts, given.seed, *given.kinds))
    if part == "fuzz":
        more = {"HEADWATER_FUZZ_SECONDS": str(given.fuzz_seconds), "HEADWATER_FUZZ_SEED": str(given.seed)}
        found = by_name(printed("fuzz_targets.py", *given.kinds, **more))
        about = {"seconds": given.fuzz_seconds, "seed": given.seed}
        return {name: each | about for name, each in found.items()}
    if part == "forwards":
        found = printed("many_forwards.py", given.forwards)[0]
        assert found["contaminated"] == 0, found
        return found
    if part == "soak":
        found = by_name(printed("soak.py", given.soak, given.soak))
        assert all(each["kb_each"] < MOST_KB for each in found.values()), found
        return found
    found = printed("many_visitors.py", given.visitors, given.seconds)[0]
    assert not found.pop("examples"), found
    assert found["level"], found
    return found


def main() -> None:
    parts = ["kills", "interrupts", "fuzz", "forwards", "soak", "visitors"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=parts)
    for name, default in (
        ("kills", 20), ("interrupts", 20), ("fuzz-seconds", 60), ("seed", 1), ("forwards", 10_000), ("soak", 10_000),
        ("visitors", 20), ("seconds", 600),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="*", default=[], help="kinds of files or commands, else all")
    given = parser.parse_args()
    for part in given.parts:
        found = measured(part, given)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        # of kinds that were not tried now
        earlier = kept.get(part, {}) if part in ("fuzz", "interrupts") and given.kinds else {}
        kept[part] = {**earlier, "date": datetime.now(UTC).date().isoformat(), **found}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(part, json.dumps(found))


if __name__ == "__main__":
    main()
