"""Visitors of a dashboard, each over a socket of its own, who ablate two heads of their own and read what it does.

`python tests/support/many_visitors.py VISITORS SECONDS` prints how many pages were seen, how many of them
showed another answer than that of the visitor's own edit, and the most memory that the server took in each minute.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from visits import started

import headwater as hw

MODEL, TEXT = "tasks-4l", "When Mary and John went to the store , John gave a drink to"
PORT, WAIT = 8790, 120
LABEL = "log p(‹Mary›)"
MINUTE = 60
LEVEL = 1.1  # the last minutes take at most so many times what the minutes in the middle took


def answers() -> dict[tuple[str, ...], str]:
    """What the page Edit says of log p(Mary) without each two heads, from the library alone."""
    model = hw.load(MODEL)
    mary = int(model.to_tokens("Mary").ids[0, -1])
    found = {}
    for heads in itertools.combinations([f"{layer}.{head}" for layer in range(4) for head in range(8)], 2):
        with model.edit(hw.AblateHeads(list(heads))):
            found[heads] = f"{model(TEXT)[0, -1].double().log_softmax(-1)[mary]:.4g}"
    return found


async def seen(address: str, heads: tuple[str, ...]) -> str:
    """The number that a visitor reads who ablates these heads."""
    import websockets
    from streamlit.proto.BackMsg_pb2 import BackMsg
    from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

    edit = {"edit": "AblateHeads", "heads": list(heads), "ablation": "zero"}
    query = urllib.parse.urlencode({"model": MODEL, "edits": json.dumps([edit])})
    url = f"{address.replace('http', 'ws', 1)}/_stcore/stream"
    asked = BackMsg()
    asked.rerun_script.query_string = query
    asked.rerun_script.page_name = "edit"
    end = time.monotonic() + WAIT
    more: dict[str, Any] = {"origin": address, "subprotocols": ["streamlit"], "max_size": 2**27}
    async with websockets.connect(url, **more) as socket:
        while time.monotonic() < end:
            await socket.send(asked.SerializeToString())
            found = ""
            async for data in socket:
                told = ForwardMsg()
                told.ParseFromString(data)
                metric = told.delta.new_element.metric
                if metric.label.replace("\\", "") == LABEL:
                    found = metric.body
                if told.WhichOneof("type") == "script_finished":
                    break
            if found:
                return found
            await asyncio.sleep(0.5)  # its run is being made
    raise TimeoutError(f"no answer for {heads} in {WAIT} s")


async def visits(
    address: str, count: int, seconds: float, right: dict[tuple[str, ...], str], process: Any
) -> dict[str, Any]:
    pages, wrong, failed = [], [], []
    minutes: dict[int, int] = {}  # the most memory in each, in bytes
    begun = time.monotonic()
    end = begun + seconds

    async def visitor(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            heads = chance.choice(list(right))
            try:
                found = await seen(address, heads)
            except (OSError, TimeoutError) as error:
                failed.append(repr(error))
                continue
            pages.append(heads)
            if found != right[heads]:
                wrong.append((heads, found, right[heads]))

    async def weigh() -> None:
        while (now := time.monotonic()) < end:
            memory = sum(each.memory_info().rss for each in process())
            minute = int((now - begun) // MINUTE)
            minutes[minute] = max(minutes.get(minute, 0), memory)
            await asyncio.sleep(1)

    await asyncio.gather(weigh(), *(visitor(n) for n in range(count)))
    return {
        "visitors": count, "seconds": seconds, "pages": len(pages), "wrong": len(wrong), "failed": len(failed),
        "memory_mb": (memory := [round(minutes[minute] / 1e6) for minute in sorted(minutes)]),
        "level": is_level(memory),
        "examples": wrong[:3] + failed[:3],
    }  # fmt: skip


def is_level(memory: Sequence[float]) -> bool:
    """Whether the last third of the minutes took hardly more memory than the third in the middle; so of few."""
    third = len(memory) // 3
    return third < 2 or max(memory[2 * third :]) <= LEVEL * max(memory[third : 2 * third])


def visited(count: int, seconds: float) -> dict[str, Any]:
    """So many visitors at once for so long."""
    right = answers()
    me = psutil.Process()
    with tempfile.TemporaryDirectory() as made, started(MODEL, PORT, Path(made), prompt=TEXT) as address:
        found = re.match(r"http://[\d.]+:\d+", address)
        assert found is not None
        return asyncio.run(visits(found[0], count, seconds, right, lambda: me.children(recursive=True)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(visited(int(sys.argv[1]), float(sys.argv[2]))))
