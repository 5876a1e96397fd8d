"""Llamas whose weights are written by hand: which heads and MLPs carry the answer is known by construction.

RMSNorm, rotary positions, grouped queries (four heads, two of keys and values), gated MLPs. The stream is a row of
named parts, all of them one-hot or constant, so that its length is the same at every position where it matters. All
that is not part of the circuit has small random weights ("noise"): its heads look around and it writes into every part
of the stream, too little to change an answer. Heads of a group share its key and value, so half of the noise heads read
what the planted head reads.

What places a head looks at comes from rotary frequencies, which are the same in every prompt: prompts that differ in
their tokens move only the edges that carry tokens, and those are what `edges` names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

BOS = 0
HEADS, KV_HEADS, D_HEAD, THETA = 4, 2, 64, 1e8
FAST = (0, 1, 2)  # frequencies 1, 0.56 and 0.32 per token: they tell distances apart
SLOW = [*range(18, 32), *range(50, 64)]  # at most 3e-5 per token: 28 coordinates that rotation leaves alone


@dataclass(frozen=True)
class PlantedLlama:
    """The model, the nodes that carry the answer, and the edges (sender, input) between them."""

    model: hf.LlamaForCausalLM
    nodes: frozenset[str]
    edges: frozenset[tuple[str, str]]

    def between(self) -> dict[str, set[str]]:
        """Which nodes each node but the embedding hears: what path patching must find."""
        return {node: {u for u, v in self.edges if v.startswith(node)} for node in self.nodes - {"embed"}}


class _Stream:
    """Ranges of the stream by name, and weights written in terms of them; `lengths[l]` is its length before layer l."""

    def __init__(
        self, parts: dict[str, int], lengths: list[float], vocabulary: int, neurons: int, sharp: float
    ) -> None:
        self.parts, width = {}, 0
        for name, size in parts.items():
            self.parts[name] = slice(width, width + size)
            width += size
        self.width = width = -(-width // HEADS) * HEADS  # as Llama asks
        self.lengths, self.sharp = lengths, sharp
        self.model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=neurons, num_hidden_layers=len(lengths),
                num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=D_HEAD, rms_norm_eps=1e-12,
                rope_parameters={"rope_type": "default", "rope_theta": THETA}, max_position_embeddings=64,
                tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=BOS,
            )
        ).eval()  # fmt: skip
        self.layers: Any = self.model.model.layers
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            if "norm" not in name:
                parameter.zero_()

    def noise(self, size: float, seed: int) -> None:
        """Random heads and MLPs: what they add to the stream is about `size` times as long as what they read."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            for weight in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
                weight += torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
            layer.self_attn.o_proj.weight *= size
            layer.mlp.down_proj.weight *= size

    def clear(self, layer: int, head: int) -> None:
        """Take the noise out of a head, and out of the key and value its group shares."""
        attention, group = self.layers[layer].self_attn, head // (HEADS // KV_HEADS)
        attention.q_proj.weight[head * D_HEAD : (head + 1) * D_HEAD] = 0
        attention.o_proj.weight[:, head * D_HEAD : (head + 1) * D_HEAD] = 0
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight[group * D_HEAD : (group + 1) * D_HEAD] = 0

    def read(self, layer: int, head: int, what: str, part: str, rows: Tensor, places: list[int]) -> None:
        """Coordinates `places` of a head's q, k or v get `rows` [places, size of the part] times the part."""
        attention = self.layers[layer].self_attn
        which = head if what == "q" else head // (HEADS // KV_HEADS)
        weight = getattr(attention, f"{what}_proj").weight
        index = torch.tensor(places) + which * D_HEAD
        weight[index, self.parts[part]] += rows * self.lengths[layer] / self.width**0.5

    def write(self, layer: int, head: int, part: str, size: int) -> None:
        """A head adds its first `size` coordinates to a part."""
        weight = self.layers[layer].self_attn.o_proj.weight
        weight[self.parts[part], head * D_HEAD : head * D_HEAD + size] += torch.eye(size)

    def look_back(self, layer: int, head: int, distance: int) -> None:
        """The head looks at the token `distance` before, by turning a constant key against a constant query."""
        rates = torch.tensor([THETA ** (-2 * f / D_HEAD) for f in FAST])
        gaps = torch.arange(0, 24)[:, None] - distance
        scores = torch.cos(gaps * rates).sum(1)
        margin = scores[distance] - scores[torch.arange(24) != distance].max()
        size = self.sharp * math.sqrt(D_HEAD) / margin
        one = torch.ones(len(FAST), 1)
        turned = [f + D_HEAD // 2 for f in FAST]
        self.read(layer, head, "q", "one", one * size, list(FAST))
        self.read(layer, head, "k", "one", torch.cos(distance * rates)[:, None], list(FAST))
        self.read(layer, head, "k", "one", torch.sin(distance * rates)[:, None], turned)

    def move(
        self, layer: int, head: int, source: str, target: str, size: int, but: int | None = None
    ) -> None:
        """The head's value is one part of the stream (of all tokens but one), and it writes it to another."""
        eye = torch.eye(size)
        if but is not None:
            eye[but] = 0
        self.read(layer, head, "v", source, eye, list(range(size)))
        self.write(layer, head, target, size)

    def embed(self, part: str, rows: Tensor) -> None:
        self.model.model.embed_tokens.weight[:, self.parts[part]] += rows

    def answer(self, part: str, vocabulary: int, size: float = 10.0) -> None:
        self.model.lm_head.weight[:vocabulary, self.parts[part]] = size * torch.eye(vocabulary)


def induction(vocabulary: int = 24, noise: float = 0.01, sharp: float = 20.0, seed: int = 0) -> PlantedLlama:
    """Two layers: 0.1 copies the token before, 1.2 finds the place behind an earlier copy of the present token.

    Where nothing matches 1.2 rests on `<bos>` (token 0, half a match), whose value is nothing. Texts: up to 24 tokens.
    """
    sizes = {"one": 1, "token": vocabulary, "before": vocabulary, "answer": vocabulary}
    stream = _Stream(sizes, [2**0.5, 3**0.5], vocabulary, 16, sharp)
    stream.noise(noise, seed)
    tokens = torch.eye(vocabulary)
    stream.embed("token", tokens)
    stream.embed("one", torch.ones(vocabulary, 1))

    stream.clear(0, 1)
    stream.look_back(0, 1, 1)
    stream.move(0, 1, "token", "before", vocabulary)

    stream.clear(1, 2)
    size = sharp * D_HEAD**0.5
    rest = torch.zeros(1, vocabulary)
    rest[0, BOS] = 0.5
    stream.read(1, 2, "q", "token", tokens * size, SLOW[:vocabulary])
    stream.read(1, 2, "q", "one", torch.full((1, 1), size), SLOW[-1:])
    stream.read(1, 2, "k", "before", tokens, SLOW[:vocabulary])
    stream.read(1, 2, "k", "token", rest, SLOW[-1:])
    stream.move(1, 2, "token", "answer", vocabulary, but=BOS)
    stream.answer("answer", vocabulary)
    edges = {("embed", "0.1.v"), ("0.1", "1.2.k"), ("embed", "1.2.q"), ("embed", "1.2.v"), ("1.2", "logits")}
    return PlantedLlama(stream.model, frozenset({"embed", "0.1", "1.2", "logits"}), frozenset(edges))


def chain(vocabulary: int = 24, noise: float = 0.01, sharp: float = 20.0, seed: int = 0) -> PlantedLlama:
    """V-composition through three layers: 0.0 looks one back, 1.3 two, 2.1 one, each moving what the one below moved,
    so that the token four places back is the answer."""
    steps = ((0, 0, 1), (1, 3, 2), (2, 1, 1))
    names = ["token", "moved.0", "moved.1", "answer"]
    stream = _Stream(
        {"one": 1} | dict.fromkeys(names, vocabulary), [2**0.5, 3**0.5, 2.0], vocabulary, 16, sharp
    )
    stream.noise(noise, seed)
    stream.embed("token", torch.eye(vocabulary))
    stream.embed("one", torch.ones(vocabulary, 1))
    for layer, head, distance in steps:
        stream.clear(layer, head)
        stream.look_back(layer, head, distance)
        stream.move(layer, head, names[layer], names[layer + 1], vocabulary)
    stream.answer("answer", vocabulary)
    edges = {("embed", "0.0.v"), ("0.0", "1.3.v"), ("1.3", "2.1.v"), ("2.1", "logits")}
    return PlantedLlama(stream.model, frozenset({"embed", "0.0", "1.3", "2.1", "logits"}), frozenset(edges))


def relation(
    subjects: int = 5,
    relations: int = 3,
    others: int = 8,
    noise: float = 0.01,
    sharp: float = 20.0,
    seed: int = 0,
) -> PlantedLlama:
    """Three layers: 0.3 fetches the subject of the text to all places behind it, and MLP 1 answers what the present
    token (a relation) says of it, one neuron for each of both: silu(s·(subject + relation - 3/2)). Layer 2 is noise.

    Tokens: `<bos>`, the subjects, the relations, other words, and the answers 1 + subjects + relations + others + pair.
    """
    words = 1 + subjects + relations + others
    vocabulary = words + subjects * relations
    sizes = {"one": 1, "token": words, "subject": subjects, "answer": subjects * relations}
    stream = _Stream(sizes, [2**0.5, 3**0.5, 2.0], vocabulary, subjects * relations, sharp)
    stream.noise(noise, seed)
    stream.embed("token", torch.eye(vocabulary, words))
    stream.embed("one", torch.ones(vocabulary, 1))

    stream.clear(0, 3)
    named = torch.zeros(1, words)
    named[0, 1 : 1 + subjects] = 1
    stream.read(0, 3, "q", "one", torch.full((1, 1), sharp * D_HEAD**0.5), SLOW[:1])
    stream.read(0, 3, "k", "token", named, SLOW[:1])
    fetched = torch.zeros(subjects, words)
    fetched[:, 1 : 1 + subjects] = torch.eye(subjects)
    stream.read(0, 3, "v", "token", fetched, list(range(subjects)))
    stream.write(0, 3, "subject", subjects)

    mlp, gain = stream.layers[1].mlp, stream.lengths[1] / stream.width**0.5
    for weight in mlp.parameters():
        weight.zero_()
    for subject in range(subjects):
        for asked in range(relations):
            neuron = subject * relations + asked
            mlp.gate_proj.weight[neuron, stream.parts["subject"].start + subject] = 2 * sharp * gain
            mlp.gate_proj.weight[neuron, stream.parts["token"].start + 1 + subjects + asked] = (
                2 * sharp * gain
            )
            mlp.gate_proj.weight[neuron, stream.parts["one"].start] = -3 * sharp * gain
            mlp.up_proj.weight[neuron, stream.parts["one"].start] = gain
            mlp.down_proj.weight[stream.parts["answer"].start + neuron, neuron] = 1 / sharp
    answers = subjects * relations
    stream.model.lm_head.weight[words:, stream.parts["answer"]] = 10 * torch.eye(answers)
    edges = {
        ("embed", "0.3.k"),
        ("embed", "0.3.v"),
        ("0.3", "mlp.1"),
        ("embed", "mlp.1"),
        ("mlp.1", "logits"),
    }
    return PlantedLlama(stream.model, frozenset({"embed", "0.3", "mlp.1", "logits"}), frozenset(edges))
