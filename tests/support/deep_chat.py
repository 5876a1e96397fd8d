"""A LLaVA of random weights whose text part is four layers deep, so that it has layers behind the second one."""

import dataclasses

import pytest
import torch

from headwater.lens.loading import zoo

IMAGE = range(2, 11)  # where the nine patches stand in the text of `zoo.inputs("llava")`


def deep_llava(seed: int = 0) -> torch.nn.Module:
    family = zoo.FAMILIES["llava"]
    text = dict(family.config["text_config"]) | {"num_hidden_layers": 4}
    with pytest.MonkeyPatch.context() as patch:
        deeper = dataclasses.replace(family, config=dict(family.config) | {"text_config": text})
        patch.setitem(zoo.KNOWN, "llava", deeper)
        return zoo.build("llava", seed)
