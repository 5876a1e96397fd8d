"""Small random models, one per architecture, built from a configuration: no network, no files.

`headwater doctor --models` and the tests run on them. Each has two to four layers of four heads (two key–value heads
in families with grouped queries), sliding windows shorter than the prompts, and weights so large that attention is far
from uniform. They exercise the code of an architecture; they say nothing about trained models.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from headwater.lens.errors import ModelError
from headwater.lens.loading.zoo_decoders import FIRST, MORE
from headwater.lens.loading.zoo_forms import FORMS
from headwater.lens.loading.zoo_hybrids import HYBRIDS
from headwater.lens.loading.zoo_shapes import FRAMES, IMAGE, IMAGE_TOKEN, MELS, PATCH, SAMPLES, Family
from headwater.lens.loading.zoo_towers import ENCODERS, SENSES, TRANSLATORS

QUIET = ("embed", "wte", "shared.weight", "relative")  # embedding tables, which are not made louder
FAMILIES: dict[str, Family] = FIRST | MORE | HYBRIDS | ENCODERS | TRANSLATORS | SENSES
KNOWN: dict[str, Family] = FAMILIES | FORMS
NEEDS = {"lora": "peft", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}


def build(name: str, seed: int = 0) -> Any:
    """The model of a family in eval mode, with eager attention; the same seed gives the same weights.

    Weight matrices are multiplied by the family's `louder` so that attention is far from uniform. ModelError where a
    package that the family needs is not installed.
    """
    family = KNOWN[name]
    package = NEEDS.get(family.change)
    if package is not None and find_spec(package) is None:
        raise ModelError(f"{family.title} needs the package {package}, which is not installed")
    kind = getattr(transformers, family.model)
    torch.manual_seed(seed)
    model = kind._from_config(kind.config_class(**family.config), attn_implementation="eager")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("sinks") or (
                family.kind == "form" and not weight.any()
            ):  # gates and queries begin at 0
                torch.nn.init.normal_(weight)
            elif weight.dim() == 2 and not any(part in key for part in QUIET):
                weight.mul_(family.louder)
    if family.change == "lora":
        model = _with_adapters(model)
    elif family.change:
        _quantise(model, family.change)
    return model.eval()


def inputs(name: str, seed: int = 0, lengths: tuple[int, ...] = (11, 11)) -> dict[str, Any]:
    """Inputs for the model of a family, under transformers' names; shorter rows are padded on the right."""
    kind, generator = FAMILIES[name].kind, torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    found: dict[str, Tensor] = {}
    if kind in ("image", "pair", "chat"):
        found["pixel_values"] = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    if kind == "speech":
        found["input_features"] = torch.randn(batch, MELS, FRAMES, generator=generator)
    if kind == "audio":
        found["input_values"] = torch.randn(batch, SAMPLES, generator=generator)
    if kind in ("seq2seq", "speech"):
        found["decoder_input_ids"] = torch.randint(3, IMAGE_TOKEN, (batch, 7), generator=generator)
    if kind not in ("image", "speech", "audio"):
        ids = torch.randint(3, IMAGE_TOKEN, (batch, longest), generator=generator)
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        if kind == "chat":
            image = torch.full((batch, (IMAGE // PATCH) ** 2), IMAGE_TOKEN)
            ids = torch.cat([ids[:, :2], image, ids[:, 2:]], 1)
            mask = torch.cat([torch.ones_like(image), mask], 1)
        found |= {"input_ids": ids, "attention_mask": mask}
    return found


def _with_adapters(model: Any) -> Any:
    """The model with low-rank adapters of random weights in its queries and values, as `peft` puts them there."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls names that transformers gives up
        return get_peft_model(model, adapters).get_base_model()


def _quantise(model: Any, bits: str) -> None:
    """Replace the linear layers below the language head, as transformers does when it loads with bitsandbytes."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    layers = [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear and path != "lm_head"]
    for path, layer in layers:
        shape = layer.in_features, layer.out_features, layer.bias is not None
        if bits == "8bit":
            made = Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            made = Linear4bit(*shape, compute_dtype=torch.float32)
            made.support_avx512bf16_for_cpu = (
                False  # else bfloat16 on some processors, for wider layers alone
            )
        made.load_state_dict(layer.state_dict())
        model.set_submodule(path, made.to("cpu"))
