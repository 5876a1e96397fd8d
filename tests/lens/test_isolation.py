"""Edits live in the context that set them: threads, tasks, nested blocks and exceptions never share or leak them.

Seen to fail with the edits in a module-level variable.
"""

from __future__ import annotations

import asyncio
import copy
import threading

import pytest
import tiny_models
import torch

import headwater as hw


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def edited(model, ids, *edits):
    with model.edit(*edits):
        return model(ids)


def test_threads_with_different_edits_never_see_each_other(model):
    ids, _ = tiny_models.batch(1, (12,))
    edits = [[hw.ScaleHeads({"1.1": 0.0})], [hw.Redistribute([0], 0.0)], [], [hw.TowardIdentity(0.9)]]
    expected = [edited(model, ids, *given) for given in edits]
    wrong, start = [], threading.Barrier(len(edits))

    def session(number):
        start.wait()
        with model.edit(*edits[number]):
            for _ in range(40):
                if not model(ids).equal(expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=session, args=(n,)) for n in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len({tuple(e[0, -1].tolist()) for e in expected}) == len(edits)


def test_tasks_interleave_without_sharing(model):
    ids, _ = tiny_models.batch(2, (8,))
    edits = [[hw.ScaleHeads({"0.1": 0.0})], []]
    expected = [edited(model, ids, *given) for given in edits]

    async def session(number):
        with model.edit(*edits[number]):
            for _ in range(5):
                await asyncio.sleep(0)
                assert model(ids).equal(expected[number])

    async def both():
        await asyncio.gather(*(session(n) for n in range(2)))

    asyncio.run(both())


def test_an_exception_inside_a_block_leaves_nothing(model):
    ids, _ = tiny_models.batch(3, (8,))
    plain = model(ids)
    with pytest.raises(RuntimeError, match="user"), model.edit(hw.TowardIdentity(1.0)):
        raise RuntimeError("user")
    assert model(ids).equal(plain)
    assert model.edits == ()


def test_an_exception_in_the_forward_pass_leaves_nothing(model):
    ids, _ = tiny_models.batch(3, (8,))
    plain = model(ids)
    with pytest.raises(hw.HeadwaterError), model.edit(hw.Knockout([50], [0])):
        model.record(ids)
    assert model(ids).equal(plain)


def test_nothing_is_kept_on_the_model(model):
    ids, _ = tiny_models.batch(4, (8,))
    plain = model(ids)
    weights = {key: value.clone() for key, value in model.hf.state_dict().items()}
    with model.edit(hw.ScaleHeads({"1.1": 0.0})):
        model(ids)
        twin = hw.load(copy.deepcopy(model.hf))
        assert twin(ids).equal(plain), "a copy of the model carries no edits"
    assert all(value.equal(weights[key]) for key, value in model.hf.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def test_edits_of_one_model_do_not_touch_another(model):
    other = hw.load(tiny_models.tiny("llama", seed=1))
    ids, _ = tiny_models.batch(5, (8,))
    plain = other(ids)
    with model.edit(hw.TowardIdentity(1.0)):
        assert other(ids).equal(plain)


def test_the_transformers_model_itself_sees_the_edits(model):
    """Code that calls the transformers model directly runs under the edits of its context too."""
    ids, _ = tiny_models.batch(6, (8,))
    with model.edit(hw.ScaleHeads({"1.1": 0.0})), torch.no_grad():
        assert model.hf(ids, use_cache=False).logits.equal(model(ids))
