"""`DiffusionModel`: a denoiser of diffusers, alone or in its pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from headwater.lens.diffusion.guiding import Guiding, Loss, following, guiding_of
from headwater.lens.diffusion.pixels import PixelPipeline
from headwater.lens.diffusion.steps import Steps
from headwater.lens.diffusion.watch import Keeping, watching
from headwater.lens.edits.at_steps import AtSteps
from headwater.lens.edits.base import Edit
from headwater.lens.edits.block import EditBlock, checked
from headwater.lens.errors import EditError, ModelError, PromptError, RecordError
from headwater.lens.foreign.model import ForeignModel
from headwater.lens.naming.heads import Layers
from headwater.lens.naming.measured import Labelled, Measured
from headwater.lens.records import plan
from headwater.lens.records.record import DEFAULT_STATISTICS
from headwater.lens.running.branches import Branch
from headwater.lens.running.denoising import PERTURBED


class DiffusionModel(ForeignModel):
    """A denoiser, opened with `hw.load(pipeline)` or `hw.load(module)`.

    `parts` are "self" (patches of the picture), "cross" (patches × words) and "joint" (both in one row); "cross:8x8"
    where the network has several resolutions. `pipeline` is the pipeline, None without. Edits and records act on every
    call of the denoiser inside their block, by the pipeline or by a loop of your own; a call is a step. `hw.AtSteps`
    limits an edit to some steps and to one branch of guidance.

    >>> import diffusers, headwater as hw, torch
    >>> unet = diffusers.UNet2DModel(
    ...     sample_size=8, block_out_channels=(32,), down_block_types=("AttnDownBlock2D",),
    ...     up_block_types=("AttnUpBlock2D",), layers_per_block=1)
    >>> model, noise = hw.load(unet), torch.randn(1, 3, 8, 8)
    >>> with model.record_steps() as steps:
    ...     for time in (900, 500, 100):
    ...         noise = noise - unet(noise, time).sample
    >>> steps.statistic("entropy").dims
    ('step', 'branch', 'batch', 'layer', 'head', 'query')
    """

    pipeline: Any = None

    def edit(
        self, *edits: Edit, groups: Mapping[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """As `HookedModel.edit`; the edits act on calls of the denoiser by the pipeline too."""
        for given in map(checked, edits):
            if given.own_position and self.parts[self.part_name].crosses:
                raise EditError(
                    f"{type(given).__name__} has no meaning in cross-attention; edit another part"
                )
        return _Block(self, [given.prepare(self, groups or {}) for given in edits])

    @contextlib.contextmanager
    def sampling(self, branches: Sequence[str] | None = None) -> Iterator[None]:
        """Inside, the steps of one sampling run are counted from 0, whoever calls the denoiser.

        `branches` name what stands in the batch, in equal shares: `("unconditional", "conditional")` for a loop that
        calls the denoiser with both halves of classifier-free guidance. A pipeline tells its own.
        """
        with watching(self, branches):
            yield

    @contextlib.contextmanager
    def record_steps(
        self, branches: Sequence[str] | None = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", maps: Iterable[int] | str = (), groups: plan.Groups = None,
    ) -> Iterator[Steps]:  # fmt: skip
        """`with model.record_steps() as steps:` records every step of a sampling run inside the block, in memory linear
        in the picture and the number of steps.

        `maps` are the steps of which maps are kept beside the statistics, or "all". The other settings are those of
        `record`, `branches` that of `sampling`. Seen from a part, that part alone is recorded.
        """
        if isinstance(maps, str) and maps != "all":
            raise RecordError(f"maps are 'all' or the steps of which maps are kept; got {maps!r:.40}")
        steps = Steps()
        kept = maps if isinstance(maps, str) else frozenset(maps)
        with (
            watching(self, branches) as watch,
            watch.keeping(Keeping(self, steps, statistics, layers, kept, groups)),
        ):
            yield steps

    @contextlib.contextmanager
    def guiding(
        self, loss: Loss, rate: float | Callable[[int], float], *, steps: Iterable[int] | None = None, times: int = 1,
        least: float = 0.0,
    ) -> Iterator[Guiding]:  # fmt: skip
        """Inside, the picture is moved against the slope of a loss before each step: x ← x − rate · ∂loss/∂x.

        `loss` takes the record of the conditional rows and gives one number per picture, from weights such as
        `hw.losses.picture_maps(record.part("cross"))`. `rate` is a number, or a function of the step; `steps` are those
        before which the picture is moved, all by default; `times` how often; a picture whose loss is at most `least` is
        left. The block gives an object whose `losses` are, by step, the loss before each move, and `moved` the size of
        the change of the picture, as a share of its own. Both branches of guidance and the scheduler go on from the
        moved picture. Edits act in these runs too. Each move costs a forward and a backward pass.

        >>> import headwater as hw
        >>> model = hw.load("t2i-digits")
        >>> def loss(record):
        ...     return hw.losses.overlap_loss(hw.losses.picture_maps(record.part("cross")), [[2], [6]])
        >>> with model.guiding(loss, rate=1.0, steps=range(2)) as told:
        ...     picture = model.generate("dim seven left and bright two right", num_inference_steps=4)
        >>> sorted(told.losses)
        [0, 1]
        """
        guiding = guiding_of(loss, rate, steps, times, least)
        with watching(self, None) as watch, following(self.pipeline, guiding), watch.guided(guiding):
            yield guiding

    def to_tokens(
        self, given: Any = None, attention_mask: Any = None, side: Literal["left", "right"] = "right", *,
        prepend_bos: bool | None = None, **more: Any,
    ) -> Measured:  # fmt: skip
        """The inputs of a call. A text, or several, is the first step from the noise of seed 0 (1, 2, …), and gives its
        words as the names of the tokens; this needs a `PixelPipeline`."""
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            return super().to_tokens(given, attention_mask, **more)
        if not isinstance(self.pipeline, PixelPipeline):
            raise PromptError(
                f"{self.name} reads tensors in a call of its own; for a text use model.generate or record_steps"
            )
        found = super().to_tokens(None, None, **self.pipeline.first_call(texts), **more)
        words = self.pipeline.words(texts)
        if all(row == words[0] for row in words):
            found.named = {
                key: Labelled(words[0], None) if self.parts[key[0]].crosses and key[1] == "keys" else each
                for key, each in found.named.items()
            }
        return found

    def generate(
        self, *given: Any, record: bool = False, against: Branch | None = None, **options: Any
    ) -> Any:
        """What the pipeline gives for a prompt, with the edits that are on; `options` are the pipeline's.

        `against=hw.Branch(edits, weight=w)` guides away from a run with those edits: each step becomes ε + w·(ε - ε'),
        added to the guidance by words (perturbed-attention guidance); this needs a `PixelPipeline`. With `record=True`
        the pair (output, `Steps`); settings of `record_steps` are taken out of the options.
        """
        if against is not None:
            with self.edit(*self._away(against)):
                return self.generate(
                    *given, record=record, perturbed_guidance_scale=float(against.weight), **options
                )
        if self.pipeline is None:
            raise ModelError(
                f"{self.name} has no pipeline; hw.load(pipeline), or call the denoiser in a loop of your own, inside "
                "`with model.edit(…)` or `with model.record_steps()`"
            )
        if not record:
            with watching(self, None):
                return self.pipeline(*given, **options)
        names = ("branches", "statistics", "layers", "maps", "groups")
        settings = {name: options.pop(name) for name in names if name in options}
        with self.record_steps(**settings) as steps:
            return self.pipeline(*given, **options), steps

    def _away(self, against: Branch) -> list[AtSteps]:
        """The edits of a branch; ModelError where there is no such branch, PromptError for what it can not have."""
        if not isinstance(self.pipeline, PixelPipeline):
            raise ModelError(
                f"{self.name}: against= needs a pipeline that runs a perturbed branch; run the denoiser twice in a "
                "loop of your own and join both with hw.recipes.guided"
            )
        if (
            not isinstance(against, Branch)
            or against.prompt is not None
            or against.inputs
            or against.plausible
        ):
            raise PromptError(
                "against of a picture is hw.Branch(edits, weight=w), without prompt, inputs or plausible"
            )
        return [_perturbed(edit) for edit in against.edits]


def _perturbed(edit: Edit) -> AtSteps:
    """The edit on the perturbed branch alone."""
    if not isinstance(edit, AtSteps):
        return AtSteps(edit, branch=PERTURBED)
    return dataclasses.replace(edit, branch=PERTURBED)


class _Block(EditBlock):
    """A block of edits inside of which the denoiser's calls are met, whoever makes them."""

    def __enter__(self) -> None:
        assert isinstance(self._model, DiffusionModel)
        super().__enter__()
        self._entered[-1].enter_context(watching(self._model, None))
