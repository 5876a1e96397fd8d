"""What passes through modules is seen by the thread that watches, for as long as it watches.

Mutation seen to fail: hooks that keep for every thread.
"""

from __future__ import annotations

import threading

import tiny_models
import torch

import headwater as hw
from headwater.lens.running.watching import watching


def test_calls_of_other_threads_are_not_kept() -> None:
    model = hw.load(tiny_models.tiny("gpt2"))
    ids = torch.arange(5, 11)[None]
    block = model.hf.transformer.h[0]
    before = dict(block._forward_hooks)
    with watching([block]) as calls:
        other = threading.Thread(target=model, args=(ids,))
        other.start()
        other.join()
        assert calls == []
        model(ids)
    assert [call.module for call in calls] == [block]
    model(ids)
    assert len(calls) == 1
    assert dict(block._forward_hooks) == before
