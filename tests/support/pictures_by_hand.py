"""What heads and patches of a CLIP write into the class token, from transformers' own eager weights and plain hooks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel


class Parts(NamedTuple):
    """Terms of the class token's stream, float64: heads [picture, layer, key, head, d_model], output biases [layer,
    d_model], MLPs [picture, layer, d_model], the embedding [picture, d_model], and what the final norm reads."""

    heads: Tensor
    biases: Tensor
    mlps: Tensor
    embedded: Tensor
    stream: Tensor


def random_clip(seed: int = 0) -> CLIPModel:
    """A CLIP with 10 tokens a picture and random weights, gains and biases too."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    text = {**sizes, "vocab_size": 25, "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    config = CLIPConfig(
        text_config={**text, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 12, "patch_size": 4},
        projection_dim=12,
    )
    config._attn_implementation = "eager"
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data = parameter.data * 4 + 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def parts_of(model: CLIPModel, pixels: Tensor) -> Parts:
    """One run in float64."""
    model.double()
    tower: Any = model.vision_model
    values: dict[int, Tensor] = {}
    mlps: dict[int, Tensor] = {}
    kept: dict[str, Tensor] = {}
    handles = []
    for n, layer in enumerate(tower.encoder.layers):
        handles.append(
            layer.self_attn.v_proj.register_forward_hook(lambda _, __, out, n=n: values.__setitem__(n, out))
        )
        handles.append(
            layer.mlp.register_forward_hook(lambda _, __, out, n=n: mlps.__setitem__(n, out[:, 0]))
        )
    handles.append(
        tower.pre_layrnorm.register_forward_hook(lambda _, __, out: kept.update(embedded=out[:, 0]))
    )
    handles.append(
        tower.post_layernorm.register_forward_hook(lambda _, args, __: kept.update(stream=args[0]))
    )
    out = tower(pixel_values=pixels.double(), output_attentions=True)
    for handle in handles:
        handle.remove()
    heads = []
    for n, (layer, weights) in enumerate(zip(tower.encoder.layers, out.attentions, strict=True)):
        count = weights.shape[1]
        value = values[n].unflatten(-1, (count, -1))  # [picture, key, head, d]
        matrix = layer.self_attn.out_proj.weight.unflatten(1, (count, -1))  # [d_model, head, d]
        heads.append(torch.einsum("bhk,bkhd,mhd->bkhm", weights[:, :, 0], value, matrix))
    biases = torch.stack([layer.self_attn.out_proj.bias for layer in tower.encoder.layers])
    model.float()
    return Parts(torch.stack(heads, 1), biases, torch.stack([mlps[n] for n in sorted(mlps)], 1), **kept)
