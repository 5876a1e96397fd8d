"""A function stands in for a module in one context alone.

Mutation seen to fail: a function left on a module.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from headwater.lens.attention.standing_in import runs_itself, standing_in


def test_functions_stand_in_for_modules_in_their_own_context() -> None:
    module = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = module(x)
    begun, done = threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    def other() -> None:
        with standing_in({module: lambda given: given - 7}):
            begun.set()
            done.wait(10)
            found["theirs"] = module(x)
        found["after"] = module(x)

    thread = threading.Thread(target=other)
    with standing_in({module: lambda given: given * 3}):
        thread.start()
        begun.wait(10)
        assert module(x).equal(x * 3)
        with standing_in({module: lambda given: None}):
            assert module(x).equal(plain)
        assert runs_itself(module)
    assert module(x).equal(plain)  # the other's is still on
    done.set()
    thread.join()
    assert found["theirs"].equal(x - 7)
    assert found["after"].equal(plain)
    assert "forward" not in vars(module)
    vars(module)["forward"] = lambda given: given  # somebody else's
    assert not runs_itself(module)
    with standing_in({module: lambda given: given + 1}):
        assert not runs_itself(module)
    assert module(x) is x
