"""`open_model`: switch a transformers model to Headwater's attention function, and check that its outputs stay equal.

A short run on arbitrary inputs finds the attention modules and the parts. Its outputs are compared with those of
transformers' own attention. ModelError if they differ, or if the model does not call the attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention import context
from headwater.lens.attention.function import NAME
from headwater.lens.errors import HeadwaterError, ModelError
from headwater.lens.loading.flows import with_flows
from headwater.lens.loading.patch_places import with_patches
from headwater.lens.loading.stacks import with_stacks
from headwater.lens.model import HookedModel
from headwater.lens.models import parts, read_only
from headwater.lens.models.classes import labels_of, logits_of
from headwater.lens.models.closeness import close_or_refuse
from headwater.lens.models.signature import embedding, image_token, image_tokens, names, pair, vision_config
from headwater.lens.models.stack import pattern

LENGTH, SAMPLES = 24, 4000  # tokens, and audio samples, in the short run


def open_model(hf: Any, tokenizer: Any, name: str) -> HookedModel:
    """The opened model. `hf` keeps Headwater's attention from now on; after an error it has its own again."""
    _refuse_nonfinite(hf, name)
    hf.eval()
    if not hf._can_set_attn_implementation():
        sample = _sample(hf)
        found, unread = with_stacks(hf, {"text": read_only.read_part(hf, sample)}, sample, read_only=True)
        found = with_flows(hf, found, sample)
        model = HookedModel(hf, tokenizer, found, name, unread=unread, read_only=read_only.READ_ONLY)
        return _checked(model, sample)
    original = hf.config._attn_implementation
    before = None
    sample = _sample(hf)
    try:
        if original != NAME:
            try:
                before = _run(hf, sample, name)
            except ModelError as error:
                sample, before = _another(hf, sample, name, error)
            if not _of_real(before, sample).isfinite().all():
                # in float64 eager attention gives NaN on padding whose keys are all outside of the window
                sample = {name: given for name, given in sample.items() if "attention_mask" not in name}
                before = _run(hf, sample, name)
        hf.set_attn_implementation(NAME)
        with context.discovering() as calls:
            after = _run(hf, sample, name)
        if not calls:
            raise ModelError(
                f"{type(hf).__name__} never called the attention interface; its attention can not be read"
            )
        unread = _silent(hf, {module for module, _ in calls})
        if before is not None:
            _compare(before, after, sample, hf)
        found, mixing = with_stacks(
            hf, with_patches(hf, parts.divide(hf, calls, _as_rows(sample)), sample), sample
        )
        found = with_flows(hf, found, sample)
        unread = (*unread, *mixing)
        if "pixel_values" in names(hf) and "vision" not in found:
            unread = (*unread, "vision")  # images in a format that the sample does not have
    except BaseException:
        hf.set_attn_implementation(original)
        raise
    return _checked(HookedModel(hf, tokenizer, found, name, unread=unread), sample)


def _another(
    hf: Any, sample: dict[str, Tensor], name: str, error: ModelError
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """A sample of another form that the model takes, and its output; raises the first `error` where there is none."""
    for given in _forms(hf, sample):
        try:
            return given, _run(hf, given, name)
        except ModelError:
            continue
    raise error


def _forms(hf: Any, sample: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    if "input_ids" not in sample:
        return
    if "pixel_values" in sample:
        yield _sample(hf, images=False)  # the model wants images in another format
    end = hf.config.get_text_config().eos_token_id
    if isinstance(end, int):  # the model reads a text at its end-of-text token
        ids = sample["input_ids"].masked_fill(sample["input_ids"] == end, max(end - 1, 0))
        last = sample["attention_mask"].sum(-1, keepdim=True) - 1
        ids = ids.scatter(1, last, end)
        yield {"input_ids": ids, "attention_mask": sample["attention_mask"]}
    yield {name: given[:1] for name, given in sample.items()}  # the model has no padding token
    yield {name: given[:, None] for name, given in sample.items()}  # each row is one of several choices


def _as_rows(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sample as attention sees it: choices [row, choice, position] are rows."""
    choices = "input_ids" in sample and sample["input_ids"].dim() == 3
    return {name: given.flatten(0, 1) for name, given in sample.items()} if choices else sample


def answer(out: Any) -> Tensor:
    """The main output of a run: logits, else the last hidden state, else the image–text similarity."""
    for field in ("logits", "last_hidden_state"):
        found = getattr(out, field, None)
        if isinstance(found, Tensor):
            return found
    if (found := logits_of(out)) is not None:
        return found
    raise ModelError(f"{type(out).__name__} holds no logits and no hidden state; this model can not be read")


def _refuse_nonfinite(hf: Any, name: str) -> None:
    for key, weight in hf.state_dict().items():
        if not isinstance(
            weight, Tensor
        ):  # the packed weights of torch's quantised modules are whole numbers
            continue
        if weight.is_meta:
            raise ModelError(
                f"the weights of {name} are offloaded (device_map), first {key}, and can not be checked; load it "
                "without offloading, on fewer bits or on more devices"
            )
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ModelError(
                f"the weights of {name} hold NaN or infinite values, first in {key}; take another copy of them"
            )


def _sample(hf: Any, images: bool = True) -> dict[str, Tensor]:
    """Two rows of arbitrary inputs; the second row of text has padding on the right."""
    found: dict[str, Tensor] = {}
    known, table = names(hf), embedding(hf)
    weight = next(hf.parameters())
    seeded = torch.Generator().manual_seed(0)
    vision = vision_config(hf)
    side = pair(getattr(vision, "image_size", None))
    if images and "pixel_values" in known and side:
        shape = (2, getattr(vision, "num_channels", 3), *side)
        found["pixel_values"] = torch.randn(shape, generator=seeded)
    elif "input_features" in known:
        bands = getattr(hf.config, "num_mel_bins", 80)
        frames = 2 * getattr(hf.config, "max_source_positions", 1500)
        found["input_features"] = torch.randn(2, bands, frames, generator=seeded)
    elif "input_values" in known:
        found["input_values"] = torch.randn(2, SAMPLES, generator=seeded)
    found = {n: t.to(weight.device, weight.dtype) for n, t in found.items()}
    if table is not None:
        source = {} if "input_ids" not in known else _text(hf, table, found, "")
        target = _text(hf, table, {}, "decoder_") if "decoder_input_ids" in known else {}
        found |= {n: t.to(weight.device) for n, t in (source | target).items()}
    return found


def _text(hf: Any, table: Any, floats: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    text = hf.config.get_text_config()
    limits = (getattr(text, field, None) for field in ("max_position_embeddings", "max_target_positions"))
    length = min(LENGTH, *(n for n in limits if isinstance(n, int) and n > 0), LENGTH)
    ids = (torch.arange(2 * length).view(2, -1) * 7919 + 5) % table.num_embeddings
    marker = image_token(hf)
    if marker is not None:
        ids = ids.masked_fill(ids == marker, (marker + 1) % table.num_embeddings)
        if "pixel_values" in floats:
            count = image_tokens(hf, floats["pixel_values"][:1])
            ids = torch.cat([ids[:, :2], torch.full((2, count), marker), ids[:, 2:]], 1)
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] - length // 3 :] = 0
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def _run(hf: Any, sample: dict[str, Tensor], name: str) -> Tensor:
    try:
        with torch.no_grad():
            return answer(hf(**sample))
    except HeadwaterError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} fails on a short input: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None


def _silent(hf: Any, called: set[nn.Module]) -> tuple[str, ...]:
    """The stacks in which no layer was called; ModelError for a stack in which only some layers were called."""
    kinds = {type(module) for module in called}
    paths = {module: path for path, module in hf.named_modules()}
    heard = {pattern(paths[module]) for module in called}
    silent = [path for path, m in hf.named_modules() if type(m) in kinds and m not in called]
    part_heard = [path for path in silent if pattern(path) in heard]
    if part_heard:
        raise ModelError(
            f"{type(hf).__name__}: the attention of {part_heard[0]} was not called; it can not be read"
        )
    return tuple(sorted({pattern(path) for path in silent}))


def _compare(before: Tensor, after: Tensor, sample: dict[str, Tensor], hf: Any) -> None:
    """ModelError if the outputs on real tokens differ; on padding the two attentions may differ."""
    before, after = _of_real(before, sample), _of_real(after, sample)
    close_or_refuse(
        before, after, f"{type(hf).__name__} gives other outputs when Headwater computes its attention",
        "; this architecture can not be read",
        allowed={torch.float64: 1e-5, torch.float32: 1e-3}.get(before.dtype, 5e-2), least=1.0, error=ModelError,
    )  # fmt: skip


def _of_real(output: Tensor, sample: dict[str, Tensor]) -> Tensor:
    mask = sample.get("decoder_attention_mask", sample.get("attention_mask"))
    if mask is None or output.dim() != 3 or output.shape[:2] != mask.shape:
        return output
    return output[mask.bool().to(output.device)]  # the last layer may be on another device than the first


def _checked(model: HookedModel, sample: dict[str, Tensor]) -> HookedModel:
    """The model with the labels of its classes, which one more run tells where it has another head than a language
    head."""
    _check_tokenizer(model)
    model.by_choice = "input_ids" in sample and sample["input_ids"].dim() == 3
    if not model.has_lm_head and model.hf.base_model is not model.hf:
        with torch.no_grad():
            out = model.hf(**{name: given[:1] for name, given in sample.items()})
        model.classes = labels_of(model.hf, out)
    return model


def _check_tokenizer(model: HookedModel) -> None:
    """ModelError for a tokenizer whose own words are more than the embeddings; tokens added to it may have none."""
    size = getattr(model.tokenizer, "vocab_size", 0)
    if isinstance(size, int) and size > model.vocab > 0:
        raise ModelError(
            f"the tokenizer knows {size} tokens but {model.name} embeds only {model.vocab}; it belongs to another model"
        )
