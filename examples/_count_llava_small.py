"""Count again what llava-small answers right, into its metrics.json: _count_llava_small.py [ordinary] [conflicting]."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import headwater as hw
from headwater.data.pictures import scenes

FOLDER = Path(__file__).resolve().parents[1] / "data" / "models" / "llava-small"
sys.path[:0] = [str(FOLDER)]
measure: Any = importlib.import_module("measure")
AT_ONCE = 20


def asker(model: hw.HookedModel) -> Any:
    """Greedy answers of the model, some questions at a time."""

    def ask(asked: Sequence[tuple[scenes.Scene, str]]) -> list[str]:
        texts = [hw.Example(text=scenes.CHAT.format(text), image=s.picture()) for s, text in asked]
        parts = [texts[n : n + AT_ONCE] for n in range(0, len(texts), AT_ONCE)]
        said = [text for part in parts for text in model.generate(part, 24)]
        return [text.rpartition("assistant\n")[2].strip() for text in said]

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sorts", nargs="*", default=[*measure.SORTS], choices=measure.SORTS, help="sorts of scenes"
    )
    parser.add_argument("--count", type=int, default=60, help="scenes of each sort")
    parser.add_argument("--out", type=Path, default=FOLDER / "metrics.json")
    args = parser.parse_args()
    ask = asker(hw.load("llava-small", dtype=torch.bfloat16))  # as in the training
    for sort in args.sorts:
        found = measure.SORTS[sort](ask, args.count)
        before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        args.out.write_text(json.dumps(before | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
