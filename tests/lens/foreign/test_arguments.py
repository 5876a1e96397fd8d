"""Arguments of a forward as tensors with names, and back."""

import pytest
import torch
from torch import nn

from headwater.lens.errors import PromptError
from headwater.lens.foreign.arguments import Arguments, batch_axes, numbers_in


class Many(nn.Module):
    def forward(self, x, step, cond=None, *, states=(), mask=None, scale=1.0):
        return x


def test_nested_arguments_go_and_come_back():
    x, text, first, step = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 5), torch.tensor([7])
    sample = {"x": x, "step": step, "cond": {"text": text, "size": 3}, "states": (first, None), "scale": 2.0}
    arguments = Arguments(Many(), sample)
    assert list(arguments.tensors) == ["x", "step", "cond.text", "states.0"]
    other = torch.randn(4, 4)
    args, kwargs = arguments.filled({**arguments.tensors, "cond.text": other, "mask": first})
    assert args[0] is x
    assert args[1] is step
    assert args[2] == {"text": other, "size": 3}
    assert kwargs["states"][0] is first
    assert kwargs["mask"] is first
    assert kwargs["scale"] == 2.0


def test_arguments_of_a_call():
    arguments = Arguments(Many(), (torch.randn(2, 3), torch.ones(1)))
    found = arguments.named((torch.zeros(5, 3), torch.ones(1)), {"mask": torch.ones(5)})
    assert {name: len(given) for name, given in found.items()} == {"x": 5, "step": 1, "mask": 5}
    args, kwargs = arguments.filled(found)
    assert len(args) == 2
    assert list(kwargs) == ["mask"]
    for given, more, why in (
        (torch.zeros(5, 3), {}, "missing a required argument: 'step'"),
        (
            (torch.zeros(5, 3), torch.ones(1)),
            {"masks": torch.ones(5)},
            "takes no 'masks': did you mean 'mask'",
        ),
        ((torch.full((5, 3), float("nan")), torch.ones(1)), {}, "x holds NaN"),
        ((torch.zeros(0, 3), torch.ones(1)), {}, "x is empty"),
        ((torch.zeros(5, 3), torch.ones(1)), {"scale": 3.0}, "scale is no tensor and not in the sample"),
    ):
        with pytest.raises(PromptError, match=why):
            arguments.named(given, more)


def test_what_is_no_tensor_stays():
    arguments = Arguments(Many(), {"x": torch.randn(2, 3), "step": torch.ones(1), "scale": 2.0})
    with pytest.raises(PromptError, match=r"scale is 3\.0, and 2\.0 in the sample"):
        arguments.named({"x": torch.zeros(5, 3), "step": torch.ones(1), "scale": 3.0}, {})


def test_numbers_and_batches():
    class Out:
        def __init__(self):
            self.sample, self.ids = torch.ones(2), torch.ones(2, dtype=torch.long)

    found = list(numbers_in(({"a": torch.zeros(3)}, [Out()], None)))
    assert [len(each) for each in found] == [3, 2]
    given = {"x": torch.zeros(4, 7), "y": torch.zeros(7, 4, 2), "t": torch.zeros(())}
    assert batch_axes(given, 4) == {"x": 0, "y": 1, "t": None}
