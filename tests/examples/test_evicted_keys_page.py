"""The table of evicted keys on the page is that of what the script has kept. Seen to fail: a digit of the page."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
WORDS = {
    "observed": "observed",
    "windowed": "windowed (SnapKV)",
    "expected": "expected attention",
    "critical": "critical (CriticalKV)",
    "recent": "the last keys",
    "random": "random keys",
}


def test_the_page_has_the_numbers_of_the_script() -> None:
    told = json.loads((DOCS / "real" / "real_evicted_keys.json").read_text("utf-8"))
    page = (DOCS / "real-models.md").read_text("utf-8")
    texts = told["each text"]
    assert len(texts) == 3
    shares = " | ".join(f"{float(share):.0%}".replace("%", " %") for share in told["kept"].split(","))
    assert f"| keys kept | {shares} |" in page
    for by, words in WORDS.items():
        columns = zip(*(each["excess"][by] for each in texts), strict=True)
        cells = (f"{sum(of) / 3:+.2f} ({min(of):+.2f} to {max(of):+.2f})" for of in columns)
        assert f"| {words} | {' | '.join(cells)} |" in page
    assert f"{sum(each['whole'] for each in texts) / 3:.2f} nats per token with all keys" in page
    needles = told["each needle of all depths"]
    assert len(needles) == 3
    assert told["needles"] == 9
    recalls = {by: [each["recall"][by] for each in needles] for by in WORDS}
    for by, words in WORDS.items():
        columns = zip(*recalls[by], strict=True)
        cells = (f"{sum(of) / 3:.2f} ({min(of):.2f} to {max(of):.2f})" for of in columns)
        assert f"| {words} | {' | '.join(cells)} |" in page
    assert f"With all keys it is {told['recall with all keys']:.2f}." in page
    fewest = {by: f"{sum(each[0] for each in of) / 3:.2f}" for by, of in recalls.items()}
    assert f"falls from {told['recall with all keys']:.2f} to {fewest['observed']}, " in page
    assert fewest["observed"] == fewest["recent"]
