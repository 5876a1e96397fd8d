"""docs/scale.md: what it says was measured is what benchmarks/sweeps.py and benchmarks/sweep_hosts.py have written.

Seen to fail with a number changed on the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def told(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def rows() -> list[str]:
    """The table as the files have it."""
    one, hosts = told("sweeps.json"), told("sweep_hosts.json")
    ledger, driver, disk = (one[part] for part in ("ledger", "driver", "disk"))
    worker, head, full = (hosts[run] for run in ("worker", "head", "disk"))
    units, full_units = f"{hosts['units']} units", f"{disk['done_when_full']} of {disk['units']} units"
    kills = [
        f"| SIGKILLs of the driver at random moments, {part['units']:,} units | {part['kills']}: same results |"
        for name, part in one.items()
        if name == "kills"
    ]
    two = [
        f"| units per second of one worker and of two, with one thread each | {part['per_s_of_one']:.0f}, "
        f"{part['per_s_of_two']:.0f}: {part['efficiency']:.2f} of twice as many |"
        for name, part in one.items()
        if name == "efficiency"
    ]
    return [
        *kills,
        f"| {ledger['units']:,} units entered in the ledger | {ledger['enter_s']:.0f} s, "
        f"{ledger['bytes_per_unit']:.0f} bytes each |",
        f"| units per second that the ledger takes one by one, and in hundreds | {ledger['per_s_one_by_one']:,.0f}, "
        f"{ledger['per_s_in_hundreds']:,.0f} |",
        f"| units per second of one driver and {driver['workers']:,} simulated workers that compute nothing | "
        f"{driver['units_per_s']:,.0f} |",
        f"| merge of {driver['shards']} shards, for each 1,000 units | {driver['merge_s_per_1000']:.1f} s |",
        *two,
        f"| a file system that was full at {full_units}, then larger | same results |",
        f"| three hosts, {units}: one killed at unit {worker['killed_after']}, the other at a fifth of its speed | "
        f"{worker['tried_again']} tried again, same results |",
        f"| three hosts, {units}: head and driver killed at unit {head['killed_after']}, then begun anew | "
        "same results |",
        f"| three hosts, {units}: a full file system on one of them | "
        f"{full['hosts_asked_no_more']} asked no more, same results |",
    ]


def where() -> str:
    """The machine of the measurements."""
    each = list(told("sweeps.json").values())
    loads = sorted(part["load"] for part in each)
    return (
        f"{each[0]['processors']} processors ({each[0]['machine']}, {each[0]['capability']}), which other programs "
        f"used too (load {loads[0]} to {loads[-1]} before the parts began)"
    )


def test_what_the_page_says_is_what_was_measured() -> None:
    table = PAGE.partition("## What was measured")[2].partition("|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == rows()
    assert where() in " ".join(PAGE.split())


if __name__ == "__main__":  # the table, to be put on the page
    print("\n".join([where(), *rows()]))
