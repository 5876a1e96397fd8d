"""What an analysis takes as its examples."""

from __future__ import annotations

import pytest
import torch

import headwater as hw
from headwater.analyses._prompts.examples import batches_of
from headwater.lens.errors import HeadwaterError


@pytest.mark.parametrize("given", [object(), torch.tensor(3), iter(["a text"]), {}, ()])
def test_what_is_no_list_of_texts_is_one_line(given: object) -> None:
    with pytest.raises(HeadwaterError) as caught:
        batches_of(hw.load("tasks-4l"), given, 4)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
