"""The loss of each example, of what a kind of model is trained for: next tokens, a class, a masked token, two towers.

A loss that has no meaning for a model is refused: a ViT without classes says nothing that could be right or wrong.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from headwater.lens.errors import ModelError, PromptError
from headwater.lens.models.classes import is_span, logits_of, own_similarity
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import compares, markers
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.forward import forward
from headwater.lens.running.written import types_mark_written

NOTHING = -100  # the label of a token that is not asked, as in transformers


def loss(model: Opened, given: Tokens, grad: bool = False) -> Float[Tensor, " batch"]:
    """`HookedModel.loss`."""
    if compares(model.hf):
        found = own_similarity(forward(model, given, grad))
        if found is None:
            raise ModelError(f"{model.name} gives no embeddings of two towers to compare; give loss=")
        return 1 - found.float()
    causal = next(iter(model.parts.values())).causal
    if model.has_lm_head and causal:
        _check_length(given)
        given = _suffix_alone(model, given)
        skipped = () if model.is_encoder_decoder else markers(model.hf).values()
        return next_token_loss(
            _logits(model, given, grad), given, skipped, shifted=not model.is_encoder_decoder
        )
    _check_kind(model, causal)
    if given.labels is None:
        raise PromptError(
            f"{model.name} {_why(causal)}, so it has no next-token loss; give label=, the right "
            f"{'class' if model.classes else 'masked token'} of each example, or a loss= of your own"
        )
    return labelled_loss(_logits(model, given, grad), given.labels)


def _check_length(given: Tokens) -> None:
    if given.labels is None and "inputs_embeds" in given.more:
        raise PromptError(
            "vectors in the place of tokens say no next token; give label=, or a loss= of your own"
        )
    if given.labels is None and int(given.mask.sum(-1).min()) < 2:
        raise PromptError("a next-token loss needs at least two tokens in every example; give longer prompts")


def _suffix_alone(model: Opened, given: Tokens) -> Tokens:
    """The tokens, labelled by those that are written, where the others are read in both directions (PaliGemma).

    PromptError where nothing is written: a model that sees its next tokens has no loss of them.
    """
    types = given.more.get("token_type_ids")
    if not types_mark_written(model.hf) or types is None or given.labels is not None:
        return given
    written = (types == 1).to(given.ids.device) & given.mask
    if not written.any(-1).all():
        raise PromptError(
            f"{model.name} reads a prompt in both directions, so it sees each next token of it; mark what it writes by "
            "1 in token_type_ids, or give label= or a loss= of your own"
        )
    return Tokens(given.ids, given.mask, given.more, given.ids.masked_fill(~written, NOTHING), given.owners)


def _check_kind(model: Opened, causal: bool) -> None:
    """ModelError for a model of which no label says what is right."""
    if not model.has_lm_head and not model.classes:
        raise ModelError(
            f"{model.name} {_why(causal)}, so it has no next-token loss; give a loss= of your own"
        )
    several = getattr(model.hf.config, "problem_type", None) in ("regression", "multi_label_classification")
    if not model.has_lm_head and (
        len(model.classes) == 1 or several or is_span(model.hf, model.classes) or model.by_choice
    ):
        raise ModelError(
            f"what {model.name} gives are no classes of which one is right; give a loss= of your own"
        )


def _why(causal: bool) -> str:
    return "has no language head" if causal else "reads in both directions"


def _logits(model: Opened, given: Tokens, grad: bool) -> Tensor:
    found = logits_of(forward(model, given, grad))
    if found is None:
        raise ModelError(f"{model.name} gives no logits, so it has no loss; give a loss= of your own")
    return found


def next_token_losses(
    logits: Float[Tensor, "batch position vocab"], given: Tokens
) -> tuple[Float[Tensor, "batch position-1"], Bool[Tensor, "batch position-1"]]:
    """Cross-entropy of each next token in nats, and whether it and the token before are real, [batch, position-1]."""
    real = (given.mask[:, 1:] & given.mask[:, :-1]).to(logits.device)
    targets = given.ids[:, 1:].to(logits.device)
    return cross_entropy(_wide(logits[:, :-1]).transpose(1, 2), targets, reduction="none"), real


def next_token_loss(
    logits: Float[Tensor, "batch position vocab"], given: Tokens, skipped: Collection[int] = (), shifted: bool = True
) -> Float[Tensor, " batch"]:  # fmt: skip
    """Mean cross-entropy over the real next tokens of each row, [batch], in nats.

    Targets in `skipped` are left out. `given.labels` [batch, position], where there are some, are what is right in the
    place of the ids; with `shifted=False` each label is right at its own position, as of a decoder in transformers.
    """
    if given.labels is not None:
        labels = given.labels[:, 1:] if shifted else given.labels
        return labelled_loss(logits[:, :-1] if shifted else logits, labels)
    losses, real = next_token_losses(logits, given)
    targets = given.ids[:, 1:].to(real.device)
    for token in skipped:
        real = real & (targets != token)
    if not real.any(-1).all():
        raise PromptError(
            f"example {int((~real.any(-1)).nonzero()[0])} has no text behind its first token whose loss could be taken"
        )
    return (losses * real).sum(-1) / real.sum(-1)


def labelled_loss(logits: Float[Tensor, "batch *position kind"], labels: Tensor) -> Float[Tensor, " batch"]:
    """Cross-entropy of the label of each row in nats, [batch]; the mean over labelled positions where each token has
    its own, `labels` [batch, position] with -100 where nothing is asked."""
    labels = labels.to(logits.device)
    if labels.shape != logits.shape[:-1]:
        raise PromptError(
            f"label has the shape {list(labels.shape)}; the model answers {list(logits.shape[:-1])} times, and "
            "each answer has one label"
        )
    if labels.dim() == 1:
        return cross_entropy(_wide(logits), labels, reduction="none")
    asked = labels != NOTHING
    if not asked.any(-1).all():
        raise PromptError(
            f"label asks nothing of example {int((~asked.any(-1)).nonzero()[0])}; each needs one"
        )
    losses = cross_entropy(_wide(logits).transpose(1, 2), labels, reduction="none", ignore_index=NOTHING)
    return (losses * asked).sum(-1) / asked.sum(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
