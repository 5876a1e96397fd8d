"""`open_model`: switch a transformers model to Headwater's attention function, and check that its outputs stay equal.

A short run on arbitrary inputs (samples.py) finds the attention modules and the parts. Its outputs are compared with
those of transformers' own attention. ModelError if they differ, or if the attention can not be read. The model is
afterwards as it was (as_it_was.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention import context, own_code, packed, windows
from headwater.lens.attention.function import NAME
from headwater.lens.attention.module_hooks import on
from headwater.lens.digest.stored import stored, walked
from headwater.lens.errors import HeadwaterError, ModelError, named_line
from headwater.lens.loading.as_it_was import State, as_it_was
from headwater.lens.loading.dense_weights import read_parts
from headwater.lens.loading.flows import with_flows
from headwater.lens.loading.folder import one_line
from headwater.lens.loading.patch_places import with_patches
from headwater.lens.loading.stacks import with_stacks
from headwater.lens.mixers.sampled import sampler, sampling
from headwater.lens.model import HookedModel
from headwater.lens.models import parts, read_only
from headwater.lens.models.classes import labels_of
from headwater.lens.models.closeness import answer, close_or_refuse, of_real
from headwater.lens.models.parts import Part
from headwater.lens.models.signature import FLOATS, image_token, names
from headwater.lens.models.stack import pattern
from headwater.lens.running.padding import moved_sides
from headwater.lens.running.placed import refuse_divided
from headwater.lens.samples.samples import as_rows, check_sample, described, samples


class _UnfitError(ModelError):
    """The model does not run on this sample."""


class _UnequalError(ModelError):
    """Headwater's attention gives other outputs, so that it has taken the model for another one."""


def open_model(hf: Any, tokenizer: Any, name: str, sample: Mapping[str, Any] | None = None) -> HookedModel:
    """The opened model. `hf` keeps Headwater's attention from now on; after an error it is as before.

    `sample`: the inputs of the short run, where the model takes none of those that samples.py makes.
    """
    with one_line(f"{name} can not be read"):
        refuse_divided(stored(walked(hf)), name)
        _refuse_nonfinite(hf, name)
        with as_it_was(hf) as state:
            hf.eval()
            tried = samples(hf) if sample is None else [check_sample(hf, sample)]
            found, unread, fitting = _first_read(hf, name, tried, state)
            found = _as_it_writes(hf, found, fitting)
            changes = state.changes()
            state.put_back()
            _refuse_exchanged(hf, found, changes)
            its_own = read_only.READ_ONLY if any(part.dense for part in found.values()) else ""
            model = HookedModel(hf, tokenizer, found, name, unread=unread, read_only=its_own)
            if not model.vocab and "text" in model.parts:
                raise ModelError(
                    f"{type(hf).__name__} has no table of token embeddings, so it is not known which ids it reads"
                )
            _check_tokenizer(model)
            _know_classes(model, fitting)
            model.sample = fitting
            model.moved_by_padding = moved_sides(model)
    return model


def _as_it_writes(hf: Any, found: dict[str, Part], sample: Mapping[str, Tensor]) -> dict[str, Part]:
    """The parts, the text causal where only the sample's types of tokens opened it: pictures, and the prompt of
    PaliGemma, are read in both directions, and what is written is not."""
    name, main = next(iter(found.items()))
    typed = "token_type_ids" in sample and image_token(hf) is not None and hf.can_generate()
    if name != "text" or not typed or hf.config.is_encoder_decoder:
        return found
    return found | {name: dataclasses.replace(main, causal=True)}


# the parts, the stacks that can not be read, and the sample that the model took
_Read = tuple[dict[str, Part], tuple[str, ...], dict[str, Tensor]]


def _first_read(hf: Any, name: str, tried: Any, state: State) -> _Read:
    """What the first sample shows that the model takes.

    After a refusal for another reason, only text alone is tried: of a model with images the text may be readable.
    """
    unfit: ModelError | None = None
    refused: HeadwaterError | None = None
    for sample in tried:
        if refused is not None and FLOATS.keys() & sample.keys():
            continue
        try:
            return (_read if _has_interface(hf) else _read_given)(hf, name, sample)
        except _UnfitError as error:
            unfit = unfit or error
        except HeadwaterError as error:
            given = None if isinstance(error, _UnequalError) else _given_after_all(hf, name, sample, state)
            if given is not None:
                return given
            if not FLOATS.keys() & sample.keys():
                raise (refused or error) from None
            refused = error if refused is None else refused
        state.put_back(everything=True)
        hf.eval()
    raise (
        refused
        or unfit
        or ModelError(
            f"{name}: no input is known that {type(hf).__name__} takes; give one with hw.load(model, sample={{…}})"
        )
    )


def _given_after_all(hf: Any, name: str, sample: dict[str, Tensor], state: State) -> _Read | None:
    """What the dense weights show of a model that can not be read through the interface; None if they do not either."""
    if not _has_interface(hf):
        return None
    own_code.part_from(hf)
    state.put_back(everything=True)
    hf.eval()
    try:
        with as_it_was(hf):
            if hf._can_set_attn_implementation():
                hf.set_attn_implementation("eager")
            return _read_given(hf, name, sample)
    except HeadwaterError:
        return None


def _has_interface(hf: Any) -> bool:
    return hf._can_set_attn_implementation() or own_code.known(hf)


def _read_given(hf: Any, name: str, sample: dict[str, Tensor]) -> _Read:
    """Read a model that computes its attention by itself."""
    _run(hf, sample, name)
    found, unread = read_parts(hf, sample, as_rows(sample))
    found, mixing = _described(hf, found, sample)
    return found, (*unread, *mixing, *_other_weights(hf, found)), sample


def _other_weights(hf: Any, found: Mapping[str, Part]) -> tuple[str, ...]:
    """Attention of the same classes whose weights the model does not give (TimeSformer's along the frames)."""
    read = {module for part in found.values() for module in part.modules}
    kinds = {type(module) for module in read}
    return tuple(
        sorted({pattern(path) for path, m in hf.named_modules() if type(m) in kinds and m not in read})
    )


def _read(hf: Any, name: str, sample: dict[str, Tensor]) -> _Read:
    """Read a model through transformers' attention interface."""
    before = None
    if hf.config._attn_implementation != NAME and not own_code.is_met(hf):
        before = _run(hf, sample, name)
        if not of_real(before, sample).isfinite().all():
            # in float64 eager attention gives NaN on padding whose keys are all outside of the window
            sample = {name: given for name, given in sample.items() if "attention_mask" not in name}
            before = _run(hf, sample, name)
    _switch(hf)
    windows.unfold_windows(hf.modules())
    with context.discovering() as calls:
        after = _run(hf, sample, name)
    kinds = {type(module) for module, _ in calls}
    if packed.read_whole(module for module in hf.modules() if type(module) in kinds):
        with context.discovering() as calls:
            after = _run(hf, sample, name)
    _refuse_repeated(hf, [module for module, _ in calls], sample)
    if not calls:
        raise ModelError(
            f"{type(hf).__name__} never called the attention interface; its attention can not be read"
        )
    unread = _silent(hf, {module for module, _ in calls})
    one, folded = parts.without_folded(hf, calls, as_rows(sample))
    if before is not None:
        _compare(before, after, sample, hf)
    found, mixing = _described(hf, parts.divide(hf, one, as_rows(sample)), sample)
    unread = (*unread, *folded, *mixing)
    if "pixel_values" in names(hf) and not any("image" in (p.queries, p.keys) for p in found.values()):
        unread = (*unread, "vision")  # images in a format that the sample does not have
    return found, (*unread, *_sampled(hf)), sample


def _switch(hf: Any) -> None:
    """Headwater's attention in the whole model, also where a module keeps a copy of the configuration (X-CLIP)."""
    if not hf._can_set_attn_implementation():
        own_code.meet(hf)
        return
    hf.set_attn_implementation(NAME)
    switched = {type(m.config) for m in hf.modules() if _implementation(m) == NAME}
    for module in hf.modules():
        if _implementation(module) not in (None, NAME) and type(module.config) in switched:
            module.config._attn_implementation = NAME


def _implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _described(
    hf: Any, found: dict[str, Part], sample: dict[str, Tensor]
) -> tuple[dict[str, Part], tuple[str, ...]]:  # fmt: skip
    """The parts with the places of patches, their blocks and their norms; and what no map covers."""
    found, mixing = with_stacks(
        hf, with_patches(hf, found, sample), sample, read_only=any(part.dense for part in found.values())
    )
    return with_flows(hf, found, sample), mixing


def _refuse_exchanged(hf: Any, found: Mapping[str, Part], changes: list[str]) -> None:
    """ModelError if the run put other attention modules in the place of those that the model had."""
    own = set(hf.modules())
    if all(module in own for part in found.values() for module in part.modules):
        return
    plain = next(
        (change for change in changes if " from " in change and ".from" not in change), "its modules"
    )
    raise ModelError(
        f"{type(hf).__name__} exchanges its attention modules on a short input (it changes {plain}), and maps of both "
        "can not be told apart; choose the latter before loading"
    )


def _refuse_nonfinite(hf: Any, name: str) -> None:
    for key, weight in stored(walked(hf)):
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


def _run(hf: Any, sample: dict[str, Tensor], name: str) -> Tensor:
    torch.manual_seed(0)  # some models draw numbers, and two runs are compared
    try:
        with torch.no_grad():
            return answer(hf(**sample))
    except HeadwaterError:
        raise
    except Exception as error:
        raise _UnfitError(
            f"{name} fails on a short input, {described(sample)}: {named_line(error)}; give an input "
            "that it takes with hw.load(model, sample={…})"
        ) from None


def _refuse_repeated(hf: Any, called: list[nn.Module], sample: dict[str, Tensor]) -> None:
    """ModelError for a module with more than one map: it serves several layers, or attends more than once."""
    twice = next((module for module in called if called.count(module) > 1), None)
    if twice is None:
        return
    runs: list[nn.Module] = []
    with torch.no_grad(), on(twice, before=lambda module, *_: runs.append(module)):
        hf(**sample)
    path, count = next(path for path, module in hf.named_modules() if module is twice), called.count(twice)
    if len(runs) == 1:
        raise ModelError(
            f"{type(hf).__name__}: {path} attends {count} times in one layer, so that the layer has no one map"
        )
    raise ModelError(f"{type(hf).__name__}: {path} serves several layers, which can not be told apart")


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


def _sampled(hf: Any) -> tuple[str, ...]:
    """The deformable attention of a model (Zhu et al. 2021), which weighs a few interpolated points of the picture."""
    kinds = {
        (type(module).__name__, pattern(path)): "" if sampler(module) is None else "; sampled_maps reads them"
        for path, module in sampling(hf).items()
    }
    return tuple(f"{name} ({where}: it weighs sampled points{told})" for (name, where), told in kinds.items())


def _compare(before: Tensor, after: Tensor, sample: dict[str, Tensor], hf: Any) -> None:
    """ModelError if the outputs on real tokens differ; on padding the two attentions may differ."""
    before, after = of_real(before, sample), of_real(after, sample)
    coarser = max(before.dtype, hf.dtype, key=lambda dtype: torch.finfo(dtype).eps)  # some widen their logits
    close_or_refuse(
        before, after, f"{type(hf).__name__} gives other outputs when Headwater computes its attention",
        "; this architecture can not be read",
        allowed={torch.float64: 1e-5, torch.float32: 1e-3}.get(coarser, 5e-2), least=1.0, error=_UnequalError,
    )  # fmt: skip


def _know_classes(model: HookedModel, sample: dict[str, Tensor]) -> None:
    """Put the labels of a classifier on the model; one more run tells them where there is no language head."""
    model.by_choice = "input_ids" in sample and sample["input_ids"].dim() == 3
    if not model.has_lm_head:
        with torch.no_grad():
            out = model.hf(**{name: given[:1] for name, given in sample.items()})
        model.classes = labels_of(model.hf, out)


def _check_tokenizer(model: HookedModel) -> None:
    """ModelError for a tokenizer whose own words are more than the embeddings; tokens added to it may have none."""
    size = getattr(model.tokenizer, "vocab_size", 0)
    if isinstance(size, int) and size > model.vocab > 0:
        raise ModelError(
            f"the tokenizer knows {size} tokens but {model.name} embeds only {model.vocab}; it belongs to another model"
        )
