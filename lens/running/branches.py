"""Contrastive decoding: a second run beside the one that generates, with other edits or another prompt.

Both runs keep caches of their own and read the same new tokens. The second one lives in a context of its own
(contextvars): nothing that is on around the call acts in it, and nobody listens to it.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from headwater.lens.attention import context, module_hooks
from headwater.lens.errors import PromptError
from headwater.lens.models import inputs
from headwater.lens.models.opened import Opened
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running import padding
from headwater.lens.running.forward import check_ready

PutOn = Callable[..., contextlib.AbstractContextManager[None]]  # `HookedModel.edit`


@dataclass(frozen=True, eq=False)
class Branch:
    """The run that `model.generate(…, against=Branch(…))` decodes against.

    At each new token the logits are ℓ* = ℓ + weight·(ℓ - ℓ'), with ℓ' of this branch (`recipes.guided`). With
    `plausible` = β above 0, tokens with ℓ < log β + max ℓ are never chosen (Li et al., ACL 2023). `edits` alone are on
    in the branch; those of a block `with model.edit(…)` act on the other run. `prompt` is another prompt, as many rows
    as the first; None is the same one. `inputs` are further inputs of the model in the place of the first run's, as in
    {"pixel_values": …}. PromptError for numbers that have no meaning.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> without = hw.Branch([hw.ScaleHeads({"2.0": 0.0, "2.6": 0.0})], weight=1.0, plausible=0.1)
    >>> model.generate(prompt, max_new_tokens=1, against=without)
    'When Mary and John went to the store , John gave a drink to Mary'
    """

    edits: Sequence[Any] = ()
    prompt: Any = None
    weight: float = 1.0
    plausible: float = 0.0
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, most in (("weight", self.weight, math.inf), ("plausible", self.plausible, 1.0)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not 0 <= value <= most:
                bounds = "0 or more" if most == math.inf else "between 0 and 1"
                raise PromptError(f"Branch: {name} is a number, {bounds}; got {value!r:.60}")
        if isinstance(self.edits, str) or not isinstance(self.edits, Sequence):
            raise PromptError(f"Branch: edits are a list of edits; got {self.edits!r:.60}")


def guided(
    plain: Float[Tensor, "*shape"], perturbed: Float[Tensor, "*shape"], weight: float
) -> Float[Tensor, "*shape"]:
    """Guidance away from a perturbed run: (1+w)·plain - w·perturbed (Ahn et al. 2025; w = 0 is the plain run).

    `model.generate(…, against=hw.Branch(edits, weight=w))` does it at each token.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> plain = model("Mary gave John a drink")
    >>> with model.edit(*hw.recipes.soft_perturbation("all")):
    ...     perturbed = model("Mary gave John a drink")
    >>> hw.recipes.guided(plain, perturbed, weight=0.5).shape
    torch.Size([1, 6, 368])
    """
    return plain + weight * (plain - perturbed)


@dataclass(frozen=True, eq=False)
class Contrast:
    """A branch with the checked inputs of its run; `put_on` is `model.edit`."""

    model: Opened
    branch: Branch
    tokens: Tokens
    put_on: PutOn
    following: int  # how many tokens will be generated at most

    @contextlib.contextmanager
    def joined(self, settings: Mapping[str, Any], row: int | None = None) -> Iterator[dict[str, Any]]:
        """The settings of transformers' `generate` with the branch among its logits processors; `row` alone of it."""
        tokens = self.tokens
        if row is not None:
            tokens = padding.without(self.model, tokens.rows([row]))
        run = _Run(self, tokens)
        try:
            given = settings.get("logits_processor") or ()
            yield {**settings, "logits_processor": LogitsProcessorList([*given, run])}
        finally:
            run.close()


def refuse_unknown(given: object, settings: Mapping[str, Any]) -> None:
    """PromptError for what is no branch, and for ways of decoding that a second run can not follow."""
    if not isinstance(given, Branch):
        raise PromptError(f"against takes hw.Branch(edits, …); got {given!r:.80}")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "custom_generate"):
        if settings.get(name) is not None:
            raise PromptError(f"{name} chooses several tokens at once; leave it out, or against")


class _Run(LogitsProcessor):
    """The second run, and the logits processor that combines its logits with the first one's."""

    def __init__(self, contrast: Contrast, tokens: Tokens) -> None:
        self._contrast, self._model = contrast, contrast.model
        self._entered = contextlib.ExitStack()
        self._taken = 0  # tokens of the first run, its prompt included, that this run has read
        self._own: Any = None  # image positions that transformers keeps on the model (Qwen-VL)
        self._context = contextvars.copy_context()
        self._context.run(self._begin, tokens)

    def close(self) -> None:
        self._context.run(self._entered.close)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        other = self._context.run(self._next, input_ids).to(scores)
        branch = self._contrast.branch
        gone = scores.isneginf()  # a logits processor before this one took these tokens out
        if branch.plausible:
            gone |= scores < scores.amax(-1, keepdim=True) + math.log(branch.plausible)
        return guided(scores, other, branch.weight).masked_fill(gone, -math.inf)

    def _begin(self, tokens: Tokens) -> None:
        self._entered.enter_context(module_hooks.off())
        for key in set(self._model.part_keys.values()):
            self._entered.enter_context(context.alone(key))
            self._entered.enter_context(context.tapping(key, context.NO_TAP))
        self._entered.enter_context(self._contrast.put_on(*self._contrast.branch.edits))
        check_ready(self._model, tokens, self._contrast.following)
        arguments = inputs.arguments(self._model, tokens, generating=True)
        with self._positions():
            self._ids, self._more = self._model.hf.generate(
                **arguments,
                max_new_tokens=self._contrast.following,
                do_sample=False,
                custom_generate=_prepared,
            )

    def _next(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocab] of this run behind the tokens `ids` of the first run."""
        with torch.no_grad(), self._positions():
            return self._step(ids)

    def _step(self, ids: Tensor) -> Tensor:
        hf = self._model.hf
        if self._taken == 0:
            given = hf.prepare_inputs_for_generation(self._ids, is_first_iteration=True, **self._more)
        else:
            new = ids[:, self._taken :].to(self._ids.device)
            self._ids = torch.cat([self._ids, new], 1)
            given = hf.prepare_inputs_for_generation(
                self._ids, next_sequence_length=new.shape[1], **self._more
            )
        self._taken = ids.shape[1]
        out = hf(**given, return_dict=True)
        self._more = hf._update_model_kwargs_for_generation(
            out, self._more, is_encoder_decoder=self._model.is_encoder_decoder
        )
        return out.logits[:, -1]

    @contextlib.contextmanager
    def _positions(self) -> Iterator[None]:
        """Inside, the model holds the image positions of this run, and afterwards those that it held before."""
        holder = next((m for m in self._model.hf.modules() if hasattr(m, "rope_deltas")), None)
        if holder is None:
            yield
            return
        outside, holder.rope_deltas = holder.rope_deltas, self._own
        try:
            yield
        finally:
            self._own, holder.rope_deltas = holder.rope_deltas, outside


def _prepared(
    hf: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
    generation_config: Any = None, **more: Any,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """The prompt's ids and the arguments of each step, as transformers' `generate` prepares them: it runs nothing."""
    return input_ids, more
