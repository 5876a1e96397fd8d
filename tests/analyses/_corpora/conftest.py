"""A small file of texts for a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEXTS = [
    "<bos> w3 w4 w5 w3 w4 w6 w7 w3", "w9", "", "   ", "w8 w8 w8 w8 w8 w8 w8 w8", "<bos> w10 w11 w12 w13 w14 w15",
    "w30 w31 w32 w30 w31 w33 w34 w30 w31 w32 w35 w36 w37 w38 w39 w40", "w3 w3",
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path
