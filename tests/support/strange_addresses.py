"""Addresses as strangers may write them, drawn at random."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "dashboard"
FIELDS = (
    "model", "prompt", "prompt_id", "decoder", "picture", "part", "answer", "wrong", "kind", "layer", "head", "query",
    "key", "edits", "b_prompt", "b_model", "shown", "pins", "view",
)  # fmt: skip
TEXTS = (
    "", " ", "null", "true", "NaN", "-Infinity", "1e400", "-1", "0", "1", "2.5", "9" * 400, "-" + "9" * 30, "[]", "{}",
    "[[1]]", "[5, 2, 0, 0]", "[0, 3, 0, 3]", "[null]", "[true, 1]", '["a", [1], null]', '{"a": 1}', '"', '"x"',
    "[" * 3999,
    "[" * 900 + "]" * 900, '{"a":' * 300 + "1" + "}" * 300, "\x00", "\u202e", "é" * 3000, "<script>", "a,b>c",
    "1.2", "0.1>1.2", "all", '["1.2"]', '[["g", "1.2"]]', '[{"analysis": "rollout", "settings": {"queries": [[]]}}]',
    '[{"analysis": [], "settings": {}}, {"analysis": "rollout", "settings": {"residual": {"a": []}, "x": 1}}]',
    '[{"edit": "Temperature", "tau": 1e308}]', '[{"edit": "Redistribute", "keys": [99999999999]}]',
)  # fmt: skip


def settings() -> list[str]:
    """The names of settings that stand in the source of the pages."""
    source = "".join(file.read_text(encoding="utf-8") for file in PAGES.glob("*/*.py"))
    return sorted(set(re.findall(r'"([a-z]{1,20}\.[a-z0-9_]{1,40})"', source)))


def strange(rng: random.Random, names: list[str], most: int = 8) -> dict[str, str]:
    """Some parameters of an address, each with a value that fits nothing, or fits something else."""
    return {rng.choice([*FIELDS, *names, *names]): _value(rng) for _ in range(rng.randint(1, most))}


def _value(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(TEXTS)
    if draw < 0.75:
        return bytes(rng.randrange(256) for _ in range(rng.randint(0, 60))).decode("latin-1")
    if draw < 0.9:
        return json.dumps(rng.choice([rng.gauss(0, 1e6), rng.randint(-5, 700), rng.sample(range(-3, 20), 4)]))
    return rng.choice(TEXTS)[:60] + rng.choice(TEXTS)[:60]
