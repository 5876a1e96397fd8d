"""What heads and patches write into the class token of a tower of images, read through its frozen end.

The end is linear once the final norm keeps its scale and an embedding its length: `W·(g ⊙ (x - mean(x)))/s` for each
term x of the stream. Layers are taken one by one, and only what is asked for is made: no [layer, head, patch, d].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.pictures import pixels_of, tokens_of, tower_of
from headwater.analyses._prompts.positions import patch_coordinates
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.frozen_norm import Norm
from headwater.analyses._streams.writers import Layer, Writers
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import norms
from headwater.lens.models.closeness import close_or_refuse, of_sums
from headwater.lens.models.signature import compares
from headwater.lens.progress import progress

Per = Literal["head", "patch", "head_patch"]
Mean = Literal["own", "shared"]


@dataclass(frozen=True, eq=False)
class ImageRun:
    """A run on pictures. `norm` is that of the class token, `matrix` [output, d_model] what reads it (None: nothing),
    `constant` [d_model] and `bias` [output] what both add, `length` [row] that of the embedding before it is made 1.

    `total` [row, output] is the model's own embedding at length 1, its logits of classes, or its normed state.
    """

    run: Writers
    norm: Norm
    matrix: Tensor | None
    constant: Tensor
    bias: Tensor
    length: Tensor
    total: Tensor

    @classmethod
    def of(cls, tower: HookedModel, batch: Batch) -> ImageRun:
        run = Writers.of(tower, batch, place=0)
        stream = run.last[:, 0]
        norm, matrix, bias, own = _end(run)
        found = Norm.of(norm, stream)
        constant = norms.norm_bias(norm, stream.shape[-1]).to(stream)
        length = own.norm(dim=-1) if compares(tower.hf) else torch.ones(len(own), dtype=torch.float64)
        length = length.to(stream)
        made = cls(run, found, matrix, constant, bias, length, own / length[:, None])
        read = made.read(made.directions(None), stream) + made.constants(made.directions(None))
        close_or_refuse(
            read, made.total, f"the outputs of {tower.name} are not its final norm and one matrix of the class token",
            allowed=of_sums(tower), least=1e-2,
        )  # fmt: skip
        return made

    def directions(self, towards: Tensor | None) -> Tensor:
        """Rows that read the norm's output, [output, d_model]; `towards` [text, output] takes outputs to texts."""
        matrix = self.matrix if self.matrix is not None else torch.eye(len(self.constant)).to(self.constant)
        return matrix if towards is None else towards.to(matrix) @ matrix

    def read(self, directions: Tensor, vectors: Tensor) -> Tensor:
        """Terms of the stream [row, …, d_model] as parts of the output, [row, …, output], each less its own mean."""
        return self.norm.divided(vectors) @ directions.T / self._lengths(vectors)

    def constants(self, directions: Tensor, towards: Tensor | None = None) -> Tensor:
        """What the biases of the norm and of the matrix add, [row, output]."""
        bias = self.bias if towards is None else towards.to(self.bias) @ self.bias
        return (directions @ self.constant + bias) / self.length[:, None]

    def mean(self, directions: Tensor, vectors: Tensor) -> Tensor:
        """What taking the mean out removed from the terms [row, …, d_model], [row, …, output]."""
        if not self.norm.centred:
            return torch.zeros(*vectors.shape[:-1], len(directions)).to(vectors)
        gain = directions @ self.norm.gain
        deviation = self.norm.deviation.reshape(-1, *[1] * (vectors.dim() - 1))
        return vectors.mean(-1, keepdim=True) / deviation * gain / self._lengths(vectors)

    def _lengths(self, vectors: Tensor) -> Tensor:
        return self.length.reshape(-1, *[1] * (vectors.dim() - 1))

    def heads(self, layer: Layer, directions: Tensor, per: Per, mean: Mean) -> Tensor:
        """What the heads of a layer write: [row, head, output], [row, key, output] or [row, head, key, output]."""
        count = len(layer.result)
        written = layer.gated(0).expand(count, -1, -1, -1)
        written = layer.written(written, 0)  # [row, head, d_value, d_model]
        read = self.written(directions, written, mean)
        n_heads = read.shape[1]
        values = layer.value.repeat_interleave(n_heads // layer.value.shape[1], 1)
        weights = layer.map.tile(slice(0, 1), slice(None))[:, :, 0].double()
        if per == "head":
            return torch.einsum("bhk,bhke,bher->bhr", weights, values, read)
        if per == "head_patch":
            return torch.einsum("bhk,bhke,bher->bhkr", weights, values, read)
        found = torch.zeros(count, weights.shape[-1], len(directions)).to(weights)
        for head in range(n_heads):
            found += weights[:, head, :, None] * (values[:, head] @ read[:, head])
        return found

    def class_token(self, layer: Layer, directions: Tensor) -> Tensor:
        """What the heads of a layer read off the class token itself, [row, output]."""
        written = layer.written(layer.gated(0).expand(len(layer.result), -1, -1, -1), 0)
        read = self.written(directions, written, "own")
        values = layer.value.repeat_interleave(read.shape[1] // layer.value.shape[1], 1)
        weights = layer.map.tile(slice(0, 1), slice(0, 1))[:, :, 0, 0].double()
        return torch.einsum("bh,bhe,bher->br", weights, values[:, :, 0], read)

    def parts(self, towards: Tensor | None, per: Per, mean: Mean) -> tuple[Tensor, dict[str, Tensor]]:
        """What heads and patches write, [row, layer, head, output], [row, key, output] or [row, layer, head, key,
        output], and the terms beside them by name, each [row, output]; all of them add up to the output.

        Where each term loses its "own" mean, the output bias of an attention and the biases of the end are terms of
        their own. With a "shared" mean, as released, the end's biases less the mean of the whole stream are shared by
        embedding, attentions and MLPs alike, and heads and keys share what falls to their attention.
        """
        directions, run = self.directions(towards), self.run
        given = self.common(directions, towards) if mean == "shared" else torch.zeros(1)
        others: dict[str, Tensor] = {}
        for name, vectors in run.parts():
            if not name[0].isdigit() and not (mean == "shared" and name.startswith("bias.")):
                others[name] = self.written(directions, vectors[:, 0], mean) + given
        if mean == "own":
            others["bias"] = self.constants(directions, towards)
        found: list[Tensor] = []
        for layer in run.layers.values():
            part = self.heads(layer, directions, per, mean)
            if mean == "shared":
                share = self.written(directions, layer.bias[:, 0], mean) + given
                cells = part[0, ..., 0].numel()
                part = part + (share / cells).reshape(len(share), *[1] * (part.dim() - 2), -1)
            found = [found[0] + part] if per == "patch" and found else [*found, part]
        return found[0] if per == "patch" else torch.stack(found, 1), others

    def written(self, directions: Tensor, vectors: Tensor, mean: Mean) -> Tensor:
        """`read`, with the terms' own means left in where they are taken out together."""
        found = self.read(directions, vectors)
        return found + self.mean(directions, vectors) if mean == "shared" else found

    def common(self, directions: Tensor, towards: Tensor | None) -> Tensor:
        """The share of each of embedding, attentions and MLPs in the end's biases less the mean of the stream."""
        mlps = sum(name.startswith("mlp.") for own in self.run.terms.values() for name in own)
        terms = 1 + len(self.run.layers) + mlps
        return (self.constants(directions, towards) - self.mean(directions, self.run.last[:, 0])) / terms

    def hold(self, found: Tensor, towards: Tensor | None) -> float:
        """How far the sum of all terms [row, output] is from the model's own output; AnalysisError where it is far."""
        own = self.total if towards is None else self.total @ towards.to(self.total).T
        close_or_refuse(
            found, own, f"what the parts of {self.run.model.name} write does not add up to its output",
            ": head outputs are edited, so they are not what the weights make of the values",
            allowed=of_sums(self.run.model), least=1e-2,
        )  # fmt: skip
        return float((found - own).abs().max())


def _end(run: Writers) -> tuple[nn.Module, Tensor | None, Tensor, Tensor]:
    """The final norm, the matrix behind it, its bias, and what came out in the run."""
    tower = run.model
    stream = run.last
    if compares(tower.hf) or tower.classes:
        end = run.end
        if bool(end.at(tower, stream, -1).any()):
            raise AnalysisError(f"{tower.name} does not read the class token; this needs a tower that does")
        output = next(call.output for call in run.calls if call.module is end.head)
        own = (output[:, 0] if output.dim() == 3 else output).double()
        bias = end.bias
        return end.norm, end.weight, torch.zeros_like(own[0]) if bias is None else bias, own
    for call in run.calls:
        whole = call.given if call.args else stream[:0]
        if whole.shape != stream.shape or not torch.equal(whole.double(), stream):
            continue
        if norms.is_norm(call.module, call.given, call.output):
            own = call.output[:, 0].double()
            return call.module, None, torch.zeros_like(own[0]), own
    raise AnalysisError(
        f"no norm reads the last stream of {tower.name} as it is, so its class token has no direct contributions; use "
        "patch"
    )


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one model in batches, with the labels of their tokens."""

    tower: HookedModel
    texts: Texts

    @classmethod
    def of(cls, model: HookedModel, examples: Examples, batch_size: int) -> Pictures:
        tower = tower_of(model)
        texts = Texts.of(tower, tokens_of(tower, pixels_of(tower, examples)), batch_size)
        grids = texts.grids[0] if texts.grids else ()
        if not grids or grids[0].start == 0:
            raise AnalysisError(
                f"{tower.name} has no class token: it reads its patches by their mean, or by attention of its own "
                "(SigLIP); give a CLIP, a ViT or a DINOv2"
            )
        return cls(tower, texts)

    def __len__(self) -> int:
        return len(self.texts.valid)

    def keys(self) -> dict[str, object]:
        """Coordinates of an axis of all tokens: their names, and where patches stand."""
        count = self.texts.valid.shape[1]
        columns = torch.arange(count).expand(len(self), -1)
        names = np.array(self.texts.strings, dtype=object).astype(str)
        found = patch_coordinates(self.texts, "key", columns)
        return {**found, "key": np.arange(count), "key_token": (("batch", "key"), names)}

    def runs(self) -> Iterator[tuple[list[int], ImageRun]]:
        """Each batch: the places of its pictures, and its run."""
        for batch in progress(self.texts.batches, desc="pictures", unit="batch"):
            yield batch.places, ImageRun.of(self.tower, batch)
