"""Path patching: whose output changes the answer by way of chosen inputs (the receivers) alone?

Three runs per sender (Wang et al. 2022, arXiv 2211.00593; in the variant of Merullo et al. 2024). The other prompt
gives the sender's output. The prompt itself, with that output and with every other head frozen, gives the inputs of the
receivers. The prompt itself, with those inputs at the receivers, is measured. Many senders run in one batch as copies
of the prompts. Each sender is patched alone, so interactions of senders do not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._measures.measure import PositionSetting
from headwater.analyses._measures.pair_scores import AnswerOfPairs, Asked, How, PairMeasure, WrongOfPairs
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pairs import PairExamples, Pairs
from headwater.analyses._runs.prompt_copies import Copies
from headwater.analyses._runs.replace_activations import Parts, Per, Swap
from headwater.analyses._streams.component_graph import EMBED
from headwater.analyses.circuits._graphs import told_by_name
from headwater.analyses.circuits._patch_cells import groups_of, replacement
from headwater.analyses.circuits._receivers import Receivers
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress
from headwater.lens.transformer_lens import names
from headwater.lens.transformer_lens.run import Function

BESIDE = ("mixer", "mlp")  # what writes to the stream beside heads


@analysis
def path_patch(
    model: HookedModel,
    clean: Examples | PairExamples,
    corrupt: Examples | None = None,
    measure: PairMeasure = "logit_difference",
    receivers: Annotated[str | Sequence[str], "logits, residual.3, or 5.1.k, 6.0.q …"] = "logits",
    mlps: Annotated[
        Literal["free", "frozen"], "whether MLPs and mixers pass on what the sender says"
    ] = "free",
    how: Annotated[How, "restore the clean output in the corrupt run, or spoil the clean run"] = "noise",
    ablation: Annotated[
        Ablation, "what the sender says: as in the other run, its mean, nothing"
    ] = "resample",
    per: Annotated[
        Per | None, "k and v under grouped queries: the shared head, or one query head's view"
    ] = None,
    answer: AnswerOfPairs = None,
    wrong: WrongOfPairs = None,
    position: PositionSetting = -1,
) -> xr.DataArray:
    """Normalised effect [batch, sender] of each sender's output on the answer, by way of the receivers.

    Senders are "embed" (the stream entering the first block, where there is one stream), the heads "0.0", "0.1" …, the
    MLPs "mlp.0" … and mixers without attention, "mixer.0" …, in layers before the last receiver's. For a sender s:
    (1) the other run gives z_s (or the output of the MLP or mixer). (2) The run itself with that output gives the
    receivers' inputs; the z of all other heads is frozen, and MLPs and mixers are recomputed (`mlps="free"`: paths
    through them count) or frozen too ("frozen": the direct path alone). (3) The run itself with those inputs at the
    receivers, everything else recomputed, is measured. All receivers are patched together; q, k and v are replaced at
    every position. Receivers may stand in any layers: those that the sender does not come before keep their inputs.

    Senders and receivers are of the model's part (`model.part("vision")`). Cross-attention in the same blocks is frozen
    like other heads. "logits" are all that comes behind the part: of an encoder or a tower of images, the stack that
    reads it, whose heads are recomputed.

    `how="noise"`: the clean run, `(m_patched - m_clean)/(m_corrupt - m_clean)`; "denoise": the corrupt run,
    `(m_patched - m_corrupt)/(m_clean - m_corrupt)`. Where the denominator is below 1e-6 the effect is NaN; `undefined`
    counts such pairs. Under grouped queries `per` says whether "5.1.k" is key–value head 1
    or the copy that query head 1 reads. `clean`, `corrupt`, `measure`, `answer`, `wrong` and `position` are as in
    `patch`; so is `ablation`, which here replaces the sender's output.

    Question: Whose output makes two prompts differ by way of these inputs?
    Unit: share of the way from the patched run's measure (0) to the other prompt's (1).
    Source: Wang et al. 2022, arXiv:2211.00593; Merullo et al. 2024, arXiv:2310.08744, whose code patches the last
    position alone, where this patches all; compared with three full runs by hand.
    Cost: two runs per sender, from its layer upwards, many senders at once; one run where logits receive.
    Not for: senders that stand in for each other; the whole effect of a sender (patch); prompts of unequal length.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> effect = hw.analyses.path_patch(model, clean, corrupt, answer="Mary", wrong="John")
    >>> str(effect.sender[effect.argmax("sender").item()].values)
    'mlp.3'
    """
    into = Receivers.of(model, receivers, per)
    asked = Asked(measure, answer, wrong, position)
    groups = groups_of(model, clean, corrupt, ablation)
    senders = _senders(model, into)
    count = sum(len(pairs.places) for pairs in groups)
    found = torch.full((count, len(senders)), torch.nan, dtype=torch.float64)
    ends = torch.zeros(2, count, dtype=torch.float64)
    for pairs in groups:
        paths = _Paths(model, pairs, asked, into, mlps == "frozen", how, ablation)
        ends[:, pairs.places] = paths.told.ends
        found[pairs.places] = paths.effects(senders)
    return xr.DataArray(
        found.numpy(),
        dims=("batch", "sender"),
        coords={
            "batch": np.arange(count), "sender": senders, "clean": ("batch", ends[0]), "corrupt": ("batch", ends[1]),
        },
        name="path_patch",
        attrs={"undefined": int(found.isnan().all(1).sum()), **asked.settings},
    )  # fmt: skip


def _senders(model: HookedModel, into: Receivers) -> list[str]:
    """All nodes before the last receiver, in the order of a run."""
    known = names.places(model)
    found = [EMBED] if f"blocks.{model.blocks[0]}.hook_resid_pre" in known else []
    for layer in model.blocks:
        if layer < into.last:
            found += [f"{layer}.{head}" for head in range(model.n_heads)] if layer in model.layers else []
            found += [f"{kind}.{layer}" for kind in BESIDE if f"blocks.{layer}.hook_{kind}_out" in known]
    return found


class _Paths:
    """Path patching of the pairs of one length; `here` is the prompt that is patched, `there` the other one."""

    def __init__(
        self, model: HookedModel, pairs: Pairs, asked: Asked, into: Receivers, frozen: bool, how: How,
        ablation: Ablation,
    ) -> None:  # fmt: skip
        self.model, self.into, self.frozen = model, into, frozen
        self.how: How = how
        known = names.places(model)
        self.heads = {f"blocks.{layer}.attn.hook_z" for layer in model.layers}
        others = {f"blocks.{layer}.hook_other_attn_out" for layer in model.layers if model.beside}
        if unknown := others - set(known):
            raise AnalysisError(
                f"what {' and '.join(model.beside)} beside the {model.part_name} of {model.name} adds to the stream is "
                f"not known (layer {min(unknown).split('.')[1]}), so its heads can not be frozen; use patch"
            )
        self.attention = self.heads | others  # frozen in every run
        self.beside = {name for name in known if name.endswith(tuple(f"hook_{kind}_out" for kind in BESIDE))}
        if frozen:
            self._refuse_unknown()
        self.embedded = f"blocks.{model.blocks[0]}.hook_resid_pre"
        self.copies, seen = Copies.of(
            model, pairs, asked, how, keep={*self.attention, *self.beside, self.embedded} & set(known)
        )
        self.told = self.copies.told
        self.start = self.copies.first if ablation == "resample" else 0
        window, count = self.copies.window(self.start), len(pairs.places)
        self.here = {name: tensor[:count, window] for name, tensor in seen.cache.items()}
        self.there = {
            name: replacement(tensor[count:, window], ablation) for name, tensor in seen.cache.items()
        }

    def _refuse_unknown(self) -> None:
        """AnalysisError unless everything beside heads that writes to the stream can be frozen."""
        known = names.places(self.model)
        wanted = {
            f"blocks.{layer}.hook_attn_out": "MLPs" for layer in self.model.layers
        }  # known if all adds up
        for block in self.model.stack:
            kinds = {step.kind for step in block.beside}
            told = {"mlp": "MLPs", "mixer": "mixers"}
            wanted |= {f"blocks.{block.layer}.hook_{kind}_out": told[kind] for kind in kinds}
        if missing := next((name for name in wanted if name not in known), None):
            raise AnalysisError(
                f"what the {wanted[missing]} of {self.model.name} add to the stream is not known (layer "
                f"{missing.split('.')[1]}); use mlps='free'"
            )

    def effects(self, senders: list[str]) -> Tensor:
        """[pair, sender]."""
        if self.start >= self.copies.stop:  # nothing differs where it could be read
            return self.told.effect(self.told.unpatched(self.how).repeat(len(senders), 1), self.how).T
        fit, found = self.copies.fitting(self.start), []
        for layer in progress([None, *self.model.blocks], desc="path patching", unit="layer"):
            mine = [name for name in senders if told_by_name(name).get("layer") == layer]
            found += [self._some(mine[i : i + fit]) for i in range(0, len(mine), fit)]
        return self.told.effect(torch.cat(found), self.how).T

    def _some(self, senders: list[str]) -> Tensor:
        """The measure [sender, pair] with the output of these senders, all of one layer, at the receivers."""
        copies, into = len(senders), self.into
        rows, layer = copies * len(self.copies.ids), told_by_name(senders[0]).get("layer")
        stream = f"blocks.{into.layer}.hook_resid_pre"
        # what receivers get is known here; only the second run goes on to the logits
        end = {"parts": f"blocks.{into.last}.attn.hook_z", "residual": stream}.get(into.kind)
        first = Swap(
            self.model, rows, forward=self._frozen(senders), parts=into.parts,
            keep=[stream] if into.kind == "residual" else (), stop=end,
        )  # fmt: skip
        if into.kind == "logits":
            return self.copies.measure(first, copies, self._from(layer), self.start)
        self.copies.reach(first, copies, self._from(layer), self.start)
        if into.kind == "residual":
            received = first.cache[stream]
            second = Swap(self.model, rows, forward={stream: lambda tensor, hook: received})
        else:
            # a run from the sender's layer does not reach the receivers below it, which the sender does not change
            inject = {layer: self._injected(layer, values) for layer, values in first.seen.items()}
            second = Swap(self.model, rows, attention=inject)
        return self.copies.measure(second, copies, into.layer, self.start)

    def _from(self, layer: int | None) -> int:
        """The layer with attention below which nothing of a run changes, if block `layer` or the embedding does."""
        layers = self.model.layers
        return layers[0] if layer is None else next((n for n in layers if n >= layer), layers[-1])

    def _injected(self, layer: int, values: Parts):
        return lambda found: self.into.given(layer, found, values)

    def _frozen(self, senders: list[str]) -> dict[str, Function]:
        """Replacements that freeze all heads (and MLPs and mixers) but the senders, each patched in its own copy."""
        copies, start = len(senders), told_by_name(senders[0]).get("layer")
        changed: dict[str, Tensor] = {}
        for name in self.attention | (self.beside if self.frozen else set()):
            if start is None or int(name.split(".")[1]) >= start:
                changed[name] = torch.cat([self.here[name]] * copies)
        frozen: dict[str, Function] = {name: _always(value) for name, value in changed.items()}
        for copy, sender in enumerate(senders):
            rows = slice(copy * len(self.copies.ids), (copy + 1) * len(self.copies.ids))
            if sender == EMBED:
                frozen[self.embedded] = _always(torch.cat([self.there[self.embedded]] * copies))
            elif (kind := sender.partition(".")[0]) in BESIDE:
                name = f"blocks.{start}.hook_{kind}_out"
                if self.frozen:
                    changed[name][rows] = self.there[name]
                else:
                    frozen[name] = _in_rows(self.there[name], rows)
            else:
                name, head = f"blocks.{start}.attn.hook_z", int(sender.partition(".")[2])
                changed[name][rows, :, head] = self.there[name][:, :, head]
        return frozen


def _always(value: Tensor) -> Function:
    return lambda tensor, hook: value


def _in_rows(value: Tensor, rows: slice) -> Function:
    """Replace an MLP's output in one copy of the prompts only."""

    def replaced(tensor: Tensor, hook: object) -> Tensor:
        tensor = tensor.clone()
        tensor[rows] = value
        return tensor

    return replaced
