"""`PixelPipeline`: draws pictures from prompts with a denoiser of pixels, a text encoder, a tokenizer and a scheduler.

The pipelines of diffusers draw latents, which an autoencoder turns into a picture; a small denoiser draws the pixels.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from headwater.lens.diffusion.samples import STATES
from headwater.lens.errors import ModelError, PromptError

MASK = "encoder_attention_mask"
MOST_STEPS = 10_000


@dataclass(eq=False)
class PixelPipeline:
    """A text → noise → `steps` calls of the denoiser → a picture of `height` × `width` pixels.

    Each call takes the rows of all branches: without words (`guidance_scale` w: u + w·(c - u); 1 leaves it out), with
    them, and perturbed (`perturbed_guidance_scale` w: + w·(c - p); None leaves it out).
    """

    denoiser: Any
    text_encoder: nn.Module
    tokenizer: Any
    scheduler: Any
    height: int
    width: int
    guidance_scale: float = 1.0
    num_inference_steps: int = 20
    do_classifier_free_guidance = False  # of the run that goes on
    do_perturbed_attention_guidance = False

    @property
    def components(self) -> dict[str, Any]:
        return {
            "transformer": self.denoiser, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer,
            "scheduler": self.scheduler,
        }  # fmt: skip

    def encode(self, texts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """What the denoiser reads of some texts, [text, word, width], and which words are real, [text, word].

        `length` is the number of tokens to pad to, by default that of the longest text.
        """
        rule = {"padding": True} if length is None else {"padding": "max_length", "max_length": length}
        given = self.tokenizer(list(texts), return_tensors="pt", **rule)
        limits = (self.tokenizer, "model_max_length"), (self.text_encoder.config, "max_position_embeddings")
        most = min(getattr(of, name, given.input_ids.shape[1]) for of, name in limits)
        if given.input_ids.shape[1] > most:
            raise PromptError(
                f"a prompt has {given.input_ids.shape[1]} tokens; the model reads at most {most}"
            )
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and bool((given.input_ids == unknown).any()):
            known = [w for w in self.tokenizer.get_vocab() if w not in self.tokenizer.all_special_tokens]
            raise PromptError(
                f"a prompt has a word that the model does not know; it knows {', '.join(sorted(known))}"
            )
        device = next(self.text_encoder.parameters()).device
        states = self.text_encoder(input_ids=given.input_ids.to(device)).last_hidden_state
        return states, given.attention_mask.to(device)

    def first_call(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The inputs of the first call of a run without guidance; the noise is that of the seeds 0, 1, …"""
        states, real = self.encode(texts)
        time = self._times(self.num_inference_steps)[0]  # the noise may depend on them
        latents = next(iter(inspect.signature(self.denoiser.forward).parameters))
        given = {latents: self.noise(range(len(texts))), "timestep": time.expand(len(texts)), STATES: states}
        return given | ({MASK: real} if _takes(self.denoiser.forward, MASK) else {})

    def words(self, texts: Sequence[str]) -> list[list[str]]:
        """The tokens of each text, as `encode` pads them."""
        ids = self.tokenizer(list(texts), return_tensors="pt", padding=True).input_ids
        return [self.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """What the pictures of some seeds begin with, [picture, channel, row, column]; each has its own draw."""
        return self._noise([torch.Generator().manual_seed(seed) for seed in seeds])

    def _noise(self, draws: Sequence[torch.Generator]) -> Tensor:
        shape = (self.denoiser.config.in_channels, self.height, self.width)
        drawn = torch.stack([torch.randn(shape, generator=each) for each in draws])
        return drawn * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str], *, seed: int | Sequence[int] = 0, guidance_scale: float | None = None,
        num_inference_steps: int | None = None, perturbed_guidance_scale: float | None = None,
        latents: Tensor | None = None, output_type: str = "pil",
    ) -> Any:  # fmt: skip
        """The picture of a prompt, or a list of pictures for a list of prompts.

        `seed` is a number, or one for each prompt; of a number n the pictures have n, n + 1 and so on. A picture does
        not depend on those beside it, also where the scheduler draws noise at every step. `latents` take the place of
        the noise. `output_type="pt"` gives a tensor [picture, channel, row, column] from 0 to 1. ModelError for pixels
        that are not finite.
        """
        given = prompt if isinstance(prompt, Sequence) else []
        texts = [prompt] if isinstance(prompt, str) else list(given)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise PromptError(f"a prompt is a text or a list of texts; got {prompt!r:.60}")
        if output_type not in ("pil", "pt"):
            raise PromptError(f"output_type is 'pil' or 'pt'; got {output_type!r:.40}")
        guidance = self.guidance_scale
        if guidance_scale is not None:
            guidance = _finite("guidance_scale", guidance_scale)
        if perturbed_guidance_scale is not None:
            perturbed_guidance_scale = _finite("perturbed_guidance_scale", perturbed_guidance_scale)
        states, real = self._words(texts, guidance != 1, perturbed_guidance_scale is not None)
        times = self._times(self.num_inference_steps if num_inference_steps is None else num_inference_steps)
        draws = [torch.Generator().manual_seed(each) for each in _seeds(seed, len(texts))]
        x = self._noise(draws) if latents is None else latents
        weight = next(self.denoiser.parameters())
        x = x.to(weight.device, weight.dtype)
        self.do_classifier_free_guidance = guidance != 1
        self.do_perturbed_attention_guidance = perturbed_guidance_scale is not None
        copies = len(states) // len(texts)
        masked = {MASK: real} if _takes(self.denoiser.forward, MASK) else {}
        drawing = {"generator": draws} if _takes(self.scheduler.step, "generator") else {}
        for time in times:
            rows = torch.cat([x] * copies)
            if hasattr(self.scheduler, "scale_model_input"):
                rows = self.scheduler.scale_model_input(rows, time)
            told = self.denoiser(rows, timestep=time.expand(len(rows)), **{STATES: states}, **masked).sample
            told = self._guided(told.chunk(copies), guidance, perturbed_guidance_scale)
            x = self.scheduler.step(told, time, x, **drawing).prev_sample
        if not bool(x.isfinite().all()):
            raise ModelError(
                "the denoiser gave pixels that are not finite; weaken the guidance or the edits, or look at the weights"
            )
        pixels = ((x.float() + 1) / 2).clamp(0, 1).cpu()
        if output_type == "pt":
            return pixels
        pictures = [_picture(each) for each in pixels]
        return pictures[0] if isinstance(prompt, str) else pictures

    def _words(self, texts: list[str], guides: bool, perturbs: bool) -> tuple[Tensor, Tensor]:
        """The words of every row, branch after branch; the prompts are encoded first."""
        states, real = self.encode(texts)
        without = [self.encode([""] * len(texts), states.shape[1])] if guides else []
        branches = [*without, *[(states, real)] * (1 + perturbs)]
        return torch.cat([each for each, _ in branches]), torch.cat([each for _, each in branches])

    def _times(self, steps: int) -> Tensor:
        """The time of each step, from noise on."""
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps <= MOST_STEPS:
            raise PromptError(
                f"num_inference_steps is a whole number from 1 to {MOST_STEPS}; got {steps!r:.40}"
            )
        flows = type(self.scheduler).__name__.startswith("FlowMatch")  # of others sigmas have another scale
        if flows and _takes(self.scheduler.set_timesteps, "sigmas"):
            self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
        else:
            self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps

    def _guided(self, told: Sequence[Tensor], guidance: float, away: float | None) -> Tensor:
        first = int(self.do_classifier_free_guidance)
        found = plain = told[first]
        if self.do_classifier_free_guidance:
            found = told[0] + guidance * (plain - told[0])
        if away is not None:
            found = found + away * (plain - told[-1])
        return found


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    given = [seed] if isinstance(seed, int) or not isinstance(seed, Sequence) else seed
    try:
        found = [operator.index(each) for each in given if not isinstance(each, bool)]
    except TypeError:
        found = []
    if given is not seed and len(found) == 1:
        found = [found[0] + n for n in range(count)]
    if len(found) != count or not all(abs(each) < 2**63 for each in found):
        raise PromptError(f"seed is a whole number, or one for each of the {count} prompts; got {seed!r:.60}")
    return found


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PromptError(f"{name} is a finite number; got {value!r:.40}")
    return float(value)


def _takes(call: Any, name: str) -> bool:
    return name in inspect.signature(call).parameters


def _picture(pixels: Tensor) -> Image.Image:
    """A picture of pixels [channel, row, column] from 0 to 1, grey or in colour."""
    levels = (255 * pixels).round().to(torch.uint8).numpy()
    if len(levels) not in (1, 3):
        raise ModelError(f"a picture has 1 or 3 channels; the denoiser gives {len(levels)}")
    return Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))
