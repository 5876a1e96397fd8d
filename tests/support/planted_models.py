"""Models whose weights are written by hand, so that what an analysis must find in them is known exactly.

All are GPT-2s whose residual stream is [u, -u]: its mean is 0, so layer norm only divides by the length of u, which is
the same at every position where it matters. MLPs are zero; heads that are not named do nothing and look evenly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import Tensor

SHARP = 60.0  # difference between scores that makes softmax one-hot in float32 (e^-60)
BOS = 0


@dataclass(frozen=True)
class Planted:
    """The model, which head does what ("layer.head"), and the edges (sender, receiver) that carry the answer."""

    model: hf.GPT2LMHeadModel
    heads: dict[str, str]
    edges: frozenset[tuple[str, str]] = field(default_factory=frozenset)


class _Stream:
    """Names for ranges of u, and GPT-2 weights written in terms of them; `lengths[l]` is |u| before layer l."""

    def __init__(
        self,
        parts: dict[str, int],
        layers: int,
        heads: int,
        vocabulary: int,
        positions: int,
        lengths: list[float],
    ) -> None:
        self.parts, start = {}, 0
        for name, size in parts.items():
            self.parts[name] = slice(start, start + size)
            start += size
        self.half = -(-start // heads) * heads  # so that the width divides by the heads
        self.lengths = lengths
        config = hf.GPT2Config(
            vocab_size=vocabulary, n_positions=positions, n_embd=2 * self.half, n_layer=layers, n_head=heads,
            bos_token_id=BOS, eos_token_id=BOS, tie_word_embeddings=False, layer_norm_epsilon=1e-12,
        )  # fmt: skip
        self.model = hf.GPT2LMHeadModel(config).eval()
        self.d_head = 2 * self.half // heads
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            if ".ln_" not in name:
                parameter.zero_()

    def embed(self, table: torch.nn.Embedding, part: str, rows: Tensor) -> None:
        """Write rows [token or position, size of the part] into u, and their negative into -u."""
        columns = self.parts[part]
        table.weight[:, columns] += rows
        table.weight[:, self.half + columns.start : self.half + columns.stop] -= rows

    def read(self, layer: int, head: int, what: str, part: str, rows: Tensor) -> None:
        """Add to a head's query, key or value a linear map [size of the part, d_head] of u as it stands."""
        third = "qkv".index(what) * 2 * self.half
        gain = self.half**0.5 / self.lengths[layer]  # what layer norm multiplies u by
        place = slice(third + head * self.d_head, third + head * self.d_head + rows.shape[1])
        self.model.transformer.h[layer].attn.c_attn.weight[self.parts[part], place] += rows / gain

    def write(self, layer: int, head: int, part: str, rows: Tensor) -> None:
        """Add to a head's output a linear map [size of z used, size of the part] of z."""
        weight = self.model.transformer.h[layer].attn.c_proj.weight
        columns, first = self.parts[part], head * self.d_head
        weight[first : first + len(rows), columns] += rows
        weight[first : first + len(rows), self.half + columns.start : self.half + columns.stop] -= rows

    def sharp(self) -> float:
        """What a query of length 1 on a key of length 1 must be multiplied by for a score of SHARP."""
        return SHARP * self.d_head**0.5


def induction(vocabulary: int = 12, positions: int = 24) -> Planted:
    """Two layers, four heads: 0.1 looks at the previous token and writes it beside its own; 1.2 looks for the place
    whose previous token is the present one, and writes the token there to the logits (K-composition).

    Where nothing matches, 1.2 rests on position 0, whose value is nothing: token 0 is `<bos>`, first in every text.
    """
    sizes = {"token": vocabulary, "place": positions, "before": vocabulary, "answer": vocabulary}
    # |u|: token and place; then the token before too; then, where there is one, the answer (2 if it is written once)
    stream = _Stream(sizes, 2, 4, vocabulary, positions, [2**0.5, 3**0.5])
    model, tokens, places = stream.model, torch.eye(vocabulary), torch.eye(positions)
    stream.embed(model.transformer.wte, "token", tokens)
    stream.embed(model.transformer.wpe, "place", places)

    back = torch.zeros(positions, positions)
    back[torch.arange(1, positions), torch.arange(positions - 1)] = 1.0
    stream.read(0, 1, "q", "place", back * stream.sharp())
    stream.read(0, 1, "k", "place", places)
    stream.read(0, 1, "v", "token", tokens)
    stream.write(0, 1, "before", tokens)

    # one more coordinate of query and key: half a match for position 0, wherever one looks from
    seek = torch.nn.functional.pad(tokens, (0, 1))
    anywhere = torch.zeros(positions, vocabulary + 1)
    anywhere[:, vocabulary] = 1.0
    rest = torch.zeros(positions, vocabulary + 1)
    rest[0, vocabulary] = 0.5
    stream.read(1, 2, "q", "token", seek * stream.sharp())
    stream.read(1, 2, "q", "place", anywhere * stream.sharp())
    stream.read(1, 2, "k", "before", seek)
    stream.read(1, 2, "k", "place", rest)
    copied = tokens.clone()
    copied[BOS] = 0.0
    stream.read(1, 2, "v", "token", copied)
    stream.write(1, 2, "answer", tokens)
    model.lm_head.weight[:, stream.parts["answer"]] = 10 * tokens

    edges = {("embed", "0.1.q"), ("embed", "0.1.k"), ("embed", "0.1.v"), ("0.1", "1.2.k")}
    edges |= {("embed", "1.2.q"), ("embed", "1.2.v"), ("1.2", "logits")}
    return Planted(model, {"previous": "0.1", "induction": "1.2"}, frozenset(edges))


def regression(
    x: Tensor, y: Tensor, omega: tuple[float, ...] = (0.3, -0.3), mu: tuple[float, ...] = (1.0, -1.0)
) -> Planted:
    """One layer that regresses in context: token t is the pair (x[t], y[t]), a text's last token asks for its y.

    Head h answers `mu_h · Σ_l softmax_l(omega_h x_l·x_q) y_l` (He et al. 2025, the algebra re-derived), written to the
    coordinate "answer". A question is a token whose y is 0; it sees itself too. Needs |x|² + y² ≤ 1 for every token.
    """
    size = x.shape[1]
    slack = (1 - (x**2).sum(1) - y**2).clamp_min(0).sqrt()
    stream = _Stream({"x": size, "y": 1, "slack": 1, "answer": 1}, 1, len(omega), len(x), 64, [1.0])
    model = stream.model
    for part, values in (("x", x), ("y", y[:, None]), ("slack", slack[:, None])):
        stream.embed(model.transformer.wte, part, values)
    for head, (sharpness, share) in enumerate(zip(omega, mu, strict=True)):
        stream.read(0, head, "q", "x", torch.eye(size) * sharpness * stream.d_head**0.5)
        stream.read(0, head, "k", "x", torch.eye(size))
        stream.read(0, head, "v", "y", torch.ones(1, 1))
        stream.write(0, head, "answer", torch.full((1, 1), share))
    model.lm_head.weight[0, stream.parts["answer"]] = 1.0
    return Planted(model, {f"head {h}": f"0.{h}" for h in range(len(omega))})
