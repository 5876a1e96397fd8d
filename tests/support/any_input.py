"""Small models that read pictures, sound and two texts: their examples, a loss, and gates on heads set by hand.

The gates are hooks in front of the output projections of the plain transformers model, which shares no code with
Headwater.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import headwater as hw
from headwater.lens.loading import zoo
from headwater.lens.models.projections import projections
from headwater.lens.naming.tokens import Tokens

PARTS = [
    ("vit_classifier", "vision"), ("clip", "vision"), ("clip", "text"), ("llava", "text"), ("llava", "vision"),
    ("t5", "encoder"), ("t5", "decoder"), ("t5", "cross"), ("whisper", "encoder"), ("whisper", "cross"),
]  # fmt: skip


class Case(NamedTuple):
    """The plain model in float64, the opened model read as one part, and two examples, together and one by one."""

    name: str
    plain: Any
    model: hw.HookedModel
    tokens: Tokens
    each: list[dict[str, Tensor]]

    def score(self, out: Any) -> Tensor:
        """What the loss of an example is, from the plain model's output."""
        if self.name == "clip":
            return 1 - torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
        logits = out.logits if out.logits.dim() == 2 else out.logits[:, -1]
        return -logits.log_softmax(-1)[:, 1]

    @property
    def loss(self) -> Any:
        """The same of what Headwater gives a loss."""
        if self.name == "clip":
            return lambda similarity, tokens: 1 - similarity
        return lambda logits, tokens: -(logits if logits.dim() == 2 else logits[:, -1]).log_softmax(-1)[:, 1]

    def gated(self, gates: Tensor) -> contextlib.AbstractContextManager[None]:
        """Gates [layer, head] on the part's heads of the plain model, by hand."""
        return self.changed(lambda place, z: z * gates[place][:, None])

    @contextlib.contextmanager
    def changed(self, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """`change(place of the layer, z [batch, position, head, d])` in front of each output projection of the part."""
        paths = {module: path for path, module in self.model.hf.named_modules()}
        handles = []
        for place, layer in enumerate(self.model.layers):

            def put(module: Any, args: tuple[Tensor, ...], place: int = place) -> tuple[Tensor, ...]:
                z = change(place, args[0].unflatten(-1, (self.model.n_heads, -1)))
                return z.flatten(-2), *args[1:]

            module = self.plain.get_submodule(paths[projections(self.model, layer).output])
            handles.append(module.register_forward_pre_hook(put))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def case(name: str, part: str) -> Case:
    """Two examples of a family, where it reads texts of unequal lengths."""
    plain = zoo.build(name).double()
    model = hw.load(copy.deepcopy(plain)).part(part)
    given = {n: t.double() if t.is_floating_point() else t for n, t in zoo.inputs(name, 1, (9, 7)).items()}
    lengths = given["attention_mask"].sum(1).tolist() if "attention_mask" in given else [0, 0]
    each = []
    for row in range(2):
        one = {n: t[row : row + 1] for n, t in given.items() if n != "attention_mask"}
        each.append({n: t[:, : lengths[row]] if n == "input_ids" else t for n, t in one.items()})
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    return Case(name, plain, model, model.to_tokens(ids, mask, **given), each)
