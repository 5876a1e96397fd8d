"""`join`: a joined model gives what its parts give."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from headwater.lens.loading.joined import join
from headwater.lens.trained.joined import joined

NAME = "llava-small"


@pytest.fixture
def parts():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, intermediate_size=16, tie_word_embeddings=True, **small)
    )
    tower = Dinov2Model(Dinov2Config(image_size=56, patch_size=14, mlp_ratio=1, **small))
    return language.eval(), tower.eval()


def test_a_joined_model_gives_what_its_parts_give(parts, tmp_path) -> None:
    language, tower = parts
    config = json.loads((joined()[NAME].path / "config.json").read_text())
    config |= {"vision_feature_layer": [1, -1], "image_seq_length": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    first, second = torch.nn.Linear(32, 16), torch.nn.Linear(16, 16)
    named = {"linear_1": first, "linear_2": second}
    save_file(
        {f"{n}.{k}": v.detach() for n, each in named.items() for k, v in each.state_dict().items()},
        tmp_path / "projector.safetensors",
    )
    whole = join(tmp_path, language, tower)
    ids = torch.tensor([[1, 4, 4, 4, 4, 7, 8]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        seen = torch.cat([states[1][:, 1:], states[-1][:, 1:]], -1)
        given = language.get_input_embeddings()(ids)
        given[:, 1:5] = second(torch.nn.functional.gelu(first(seen)))
        wanted = language(inputs_embeds=given).logits
        found = whole(input_ids=ids, pixel_values=pixels).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert whole.config.vision_config.image_size == 28  # four patches of 14 pixels, not the tower's 56
