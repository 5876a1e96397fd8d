"""Hooks act for the caller that put them on, in order, and leave with the block.

Seen to fail with hooks that act in every context; without the check of how many arguments torch hands over; without
`__reduce__`; with the context set back to what it was before the block; without `finally`; with a hook per module and
not per block.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from headwater.lens.attention import module_hooks
from headwater.lens.attention.module_hooks import off, on

ONES = torch.ones(1, 2)


@pytest.fixture
def module():
    return nn.Identity()


def plus(number):
    return lambda module, args, kwargs: ((args[0] + number, *args[1:]), kwargs)


def times(number):
    return lambda module, args, kwargs, output: output * number


def hooks_on(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_arguments_and_outputs_are_replaced_in_the_order_of_the_blocks(module):
    with on(module, before=plus(1), after=times(2)), on(module, plus(10), times(3)):
        assert module(ONES).equal(ONES * 12 * 6)
        with on(module, before=lambda *call: ((call[1][0] * 100,), {})):
            assert module(ONES).equal(ONES * 1200 * 6), "the third block sees what the first two gave"
    assert module(ONES).equal(ONES)
    assert hooks_on(module) == 0


def test_keyword_arguments_are_seen_and_replaced():
    class Doubling(nn.Module):
        def forward(self, hidden_states, *, bias=0.0):
            return hidden_states * 2 + bias, "kept"

    def before(module, args, kwargs):
        states = module_hooks.hidden_states(args, kwargs)
        args, kwargs = module_hooks.with_hidden_states(args, kwargs, states + 1)
        return args, {**kwargs, "bias": kwargs["bias"] * 10}

    def after(module, args, kwargs, output):
        return module_hooks.with_first_output(output, module_hooks.first_output(output) + kwargs["bias"])

    module = Doubling()
    with on(module, before, after):
        for found, kept in (module(ONES, bias=0.5), module(hidden_states=ONES, bias=0.5)):
            assert found.equal(ONES * 14)
            assert kept == "kept"
    assert module(ONES)[0].equal(ONES * 2)


def test_none_leaves_a_call_as_it_is(module):
    seen = []
    with on(module, lambda *call: seen.append(call[1:]), lambda *call: seen.append(call[-1])):
        assert module(ONES) is ONES
    assert seen == [((ONES,), {}), ONES]


def test_several_modules_are_hooked_once_each():
    stack = nn.Sequential(nn.Identity(), nn.Identity())
    seen = []
    with on([*stack, *stack], after=lambda module, *_: seen.append(module)), on(stack, after=times(5)):
        assert stack(ONES).equal(ONES * 5)
    assert seen == list(stack)


def test_other_threads_run_the_module_as_it_is(module):
    found = []
    with on(module, plus(1), times(2)):
        other = threading.Thread(target=lambda: found.append(module(ONES)))
        other.start()
        other.join()
        assert module(ONES).equal(ONES * 4)
    assert found[0].equal(ONES)


def test_tasks_do_not_share_hooks_and_hand_them_to_their_own_tasks(module):
    async def caller(number, turn):
        with on(module, after=times(number)):
            turn.release()
            await asyncio.sleep(0.01)
            inner = asyncio.create_task(asyncio.to_thread(module, ONES))
            return module(ONES), await inner

    async def both():
        turn = asyncio.Semaphore(0)
        return await asyncio.gather(caller(2, turn), caller(3, turn))

    for number, results in zip((2, 3), asyncio.run(both()), strict=True):
        assert all(found.equal(ONES * number) for found in results)


def test_blocks_may_end_crosswise(module):
    first, second = on(module, after=times(2)), on(module, after=times(3))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert module(ONES).equal(ONES * 3)
    second.__exit__(None, None, None)
    assert module(ONES).equal(ONES)
    assert hooks_on(module) == 0


def test_a_block_may_end_in_another_context(module):
    """The context that began it does not hold on to the function."""
    act = times(2)
    gone, begun = weakref.ref(act), contextvars.copy_context()
    block = on(module, after=act)
    del act
    begun.run(block.__enter__)
    assert module(ONES).equal(ONES)
    block.__exit__(None, None, None)
    assert hooks_on(module) == 0
    del block
    assert gone() is None


def test_an_exception_takes_the_hooks_off(module):
    with pytest.raises(ZeroDivisionError), on(module, after=lambda *_: 1 / 0):
        module(ONES)
    assert module(ONES).equal(ONES)
    assert hooks_on(module) == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_hooked_module_do_nothing(module, how):
    with on(module, plus(1), times(2)):
        twin = how(module)
        assert twin(ONES).equal(ONES)
        assert module(ONES).equal(ONES * 4)
    assert twin(ONES).equal(ONES)


def test_off_is_for_the_caller_alone_and_for_its_block(module):
    with on(module, after=times(2)):
        with off():
            assert module(ONES) is ONES
            with on(module, after=times(3)):
                assert module(ONES).equal(ONES * 3)
        assert module(ONES).equal(ONES * 2)


def test_a_hook_that_torch_calls_without_keywords_does_nothing(module):
    """As when another thread, whose context may be a copy of the caller's, is putting it on or taking it off."""
    with on(module, plus(1), times(2)):
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks_with_kwargs.clear()
        assert module(ONES) is ONES


def test_threads_that_hook_one_module_at_once_see_their_own_hooks(module):
    wrong = []

    def work(number):
        for _ in range(300):
            with on(module, after=times(number)), on(module, before=plus(0)):
                if not module(ONES).equal(ONES * number):
                    wrong.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert hooks_on(module) == 0
