"""`layout.py` and `stored.py`: whatever changes in a model, the kept layout tells what a new one would."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import tiny_models
import torch
from torch import nn

from headwater.lens.digest.layout import Layout
from headwater.lens.digest.revision import Revision


class Other(nn.Linear):
    pass


def nothing(*_):
    pass


def mlp(hf):
    return hf.model.layers[0].mlp


def child_added(hf):
    mlp(hf).extra = nn.Linear(2, 2)


def child_removed(hf):
    del hf.model.layers[1].mlp.act_fn


def children_swapped(hf):
    one, other = hf.model.layers[0], hf.model.layers[1]
    one.mlp, other.mlp = other.mlp, one.mlp


def child_named_otherwise(hf):
    inside = mlp(hf)._modules
    inside["gate"] = inside.pop("gate_proj")


def child_set_to_none(hf):
    hf.model.layers[2].post_attention_layernorm = None


def child_in_two_places(hf):
    hf.model.layers[2].again = hf.model.layers[0].self_attn


def parameter_replaced(hf):
    mlp(hf).up_proj.weight = nn.Parameter(torch.ones_like(mlp(hf).up_proj.weight))


def parameter_added(hf):
    mlp(hf).register_parameter("gain", nn.Parameter(torch.ones(3)))


def parameter_set_to_none(hf):
    mlp(hf).down_proj.weight = None


def parameter_shared(hf):
    hf.lm_head.weight = hf.model.embed_tokens.weight


def parameter_written_past_torch(hf):
    mlp(hf).up_proj.weight.data.mul_(1.5)


def buffer_added(hf):
    mlp(hf).register_buffer("table", torch.ones(2))


def buffer_that_lasts_no_more(hf):
    mlp(hf).register_buffer("shift", torch.ones(2), persistent=False)


def the_same_buffer_lasts(hf):
    mlp(hf).register_buffer("shift", torch.ones(2), persistent=True)


def attribute_added(hf):
    mlp(hf).width = 3


def attribute_moves_to_the_next_module(hf):
    # in one sweep over all names nothing is at another place
    modules = list(hf.modules())
    one = modules[modules.index(mlp(hf))]
    following = modules[modules.index(mlp(hf)) + 1]
    one.width = 3
    kept = dict(vars(following))
    del one.width
    vars(following).clear()
    vars(following).update({"width": 3, **kept})


def attribute_changed(hf):
    hf.model.layers[0].self_attn.scaling *= 3


def attribute_of_a_list_grows(hf):
    mlp(hf).sizes = [*getattr(mlp(hf), "sizes", []), 1]
    mlp(hf).sizes.append(2)


def class_changed(hf):
    mlp(hf).up_proj.__class__ = Other


def hook_on(hf):
    hf.model.layers[1].self_attn.register_forward_hook(nothing)


def hook_off(hf):
    hf.model.layers[1].self_attn._forward_hooks.clear()


def mode_changed(hf):
    hf.train(not hf.training)


def precision_changed(hf):
    hf.to(torch.bfloat16)


CHANGES = [
    child_added, child_removed, children_swapped, child_named_otherwise, child_set_to_none, child_in_two_places,
    parameter_replaced, parameter_added, parameter_set_to_none, parameter_shared, parameter_written_past_torch,
    buffer_added, buffer_that_lasts_no_more, the_same_buffer_lasts, attribute_added,
    attribute_moves_to_the_next_module, attribute_changed, attribute_of_a_list_grows, class_changed, hook_on, hook_off,
    mode_changed, precision_changed,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript itself
@pytest.mark.parametrize(
    "compiled", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())], ids=["one", "some"]
)
def test_modules_that_torchscript_has_compiled(compiled) -> None:
    hf = tiny_models.tiny("llama")
    kept = Revision(hf)
    before = kept.now()
    mlp(hf).extra = torch.jit.script(compiled)
    found = kept.now()
    assert found == told_anew(hf) != before
    with torch.no_grad():
        next(mlp(hf).extra.parameters()).add_(1)
    assert kept.now() == told_anew(hf) != found


def told_anew(hf) -> str:
    return Revision(hf).now()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_one_change(change) -> None:
    hf = tiny_models.tiny("llama")
    kept = Revision(hf)
    assert kept.now() == told_anew(hf)
    change(hf)
    assert kept.now() == told_anew(hf)
    assert kept.now() == told_anew(hf)


@pytest.mark.parametrize("seed", range(8))
def test_after_many_changes_in_any_order(seed) -> None:
    hf = tiny_models.tiny("llama")
    kept = Revision(hf)
    order = random.Random(seed).sample(CHANGES, len(CHANGES))
    for change in order:
        try:
            change(hf)
        except (AttributeError, KeyError, TypeError):  # an earlier change took away what this one changes
            continue
        assert kept.now() == told_anew(hf), change.__name__


def test_it_is_the_same_while_nothing_changes_and_holds_nothing() -> None:
    hf = tiny_models.tiny("llama")
    layout = Layout(hf)
    assert layout.still()
    dropped = weakref.ref(hf.model.layers[0].mlp)
    weight = weakref.ref(hf.model.layers[0].mlp.up_proj.weight)
    hf.model.layers[0].mlp = nn.Identity()
    gc.collect()
    assert dropped() is None
    assert weight() is None
    assert not layout.still()
