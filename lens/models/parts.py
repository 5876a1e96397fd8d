"""`Part`: one stack of attention layers of a model, and the token axes of its queries and keys.

A language model has one part, "text". T5, BART and Whisper have "encoder", "decoder" and "cross"; CLIP, SigLIP and
LLaVA have "vision" and "text"; a ViT has "vision". Modules whose paths differ only in numbers form one part. The main
part is the one whose tokens the outputs of the model belong to: the decoder, else the text, else the only part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import windows
from headwater.lens.errors import ModelError
from headwater.lens.models.norms import Flow
from headwater.lens.models.part_axes import Axes, axes_of, own_name
from headwater.lens.models.patches import Patches
from headwater.lens.models.signature import FLOATS, embedding, float_input, pair, time_axis, vision_config
from headwater.lens.models.stack import StackBlock, pattern

CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder|_to_(image|token)", re.IGNORECASE)
VISION = re.compile(r"vision|visual|image|pixel", re.IGNORECASE)
AUDIO = re.compile(r"audio|speech|feature_encoder", re.IGNORECASE)
PROBE = 24  # rows and columns of the first map that are computed to see whether it is causal


class Shape(NamedTuple):
    """Of one layer: the number of query heads, of key–value heads, of features of a head's queries and keys, and of its
    values and output."""

    heads: int
    kv: int
    d_head: int
    d_value: int


class Dense(NamedTuple):
    """Where the output of a module that computes attention by itself holds its weights, and the order of their axes
    that makes them [batch, head, query, key]."""

    place: int
    order: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """One stack: `modules` gives the layer of each attention module; `queries` and `keys` are the names of the axes,
    "text", "decoder", "encoder", "image", "audio", "series" (steps in time), "query" (learned queries) or "state"
    (other states of the model). `counts` are the lengths of axes that no input gives."""

    name: str
    modules: Mapping[nn.Module, int]
    queries: str
    keys: str
    causal: bool
    shapes: Mapping[int, Shape]  # by layer: they may differ
    d_model: int
    patches: Patches | None = None
    stride: float = 1.0  # audio frames or samples per position
    lengths: Callable[[int], Any] | None = None  # or the model's function from samples to positions
    counts: Mapping[str, int] = field(default_factory=dict)
    stack: tuple[StackBlock, ...] = ()  # what each block does, those without attention too
    flows: Mapping[int | str, Flow] = field(
        default_factory=dict
    )  # which norms the modules of each block read
    dense: Mapping[nn.Module, Dense] = field(default_factory=dict)  # of modules outside of the interface
    beside: bool = True  # whether learned queries and other states run only where images or audio are given
    time: int = -1  # the axis of a sound that is time

    def __repr__(self) -> str:
        tokens = f"{self.queries} × {self.keys}" if self.crosses else self.queries
        heads = " or ".join(str(n) for n in sorted({shape.heads for shape in self.shapes.values()}))
        return f"Part({self.name!r}, {len(self.modules)} layers × {heads} heads, of {tokens})"

    @property
    def crosses(self) -> bool:
        """Whether this is cross-attention, where no key is the query's own position."""
        return self.queries != self.keys


Calls = Sequence[tuple[nn.Module, AttentionMap]]


def divide(hf: Any, calls: Calls, sample: Mapping[str, Tensor]) -> dict[str, Part]:
    """The parts of a model from the attention calls of one run on `sample`, the main part first."""
    paths = {module: path for path, module in hf.named_modules()}
    groups: dict[str, list[tuple[nn.Module, AttentionMap]]] = {}
    stages = _stages(calls, paths)
    for module, map in calls:
        groups.setdefault(stages[module], []).append((module, map))
    seeing = [of[0][1] for where, of in groups.items() if _name(hf, where) == "vision"]
    towers = [
        map for map in seeing if map.shape[0] == pictures(sample)
    ]  # X-CLIP also attends along the frames
    image = next((map.shape[2] for map in (*towers, *seeing)), None)
    encodes = bool(getattr(hf.config, "is_encoder_decoder", False))
    parts: dict[str, Part] = {}
    for where, members in groups.items():
        name = _name(hf, where)
        stage = where.partition("@")[2]
        axes = axes_of(name, members[0][1].shape[2:], sample, None if stage else image, encodes)
        if "image_to_token" in where:  # the way back of SAM's two-way attention
            axes = Axes(axes.keys, axes.queries, axes.counts)
        elif axes.queries == "query" and name not in ("cross", "decoder"):
            name = own_name(where)
        name = f"{name}{stage}"
        if name in parts:  # two kinds of attention in one stack, or a tower within a tower
            name = f"{name}:{where}"
        parts[name] = _part(hf, name, axes, members, paths, sample)
    return main_first(parts)


def _stages(calls: Calls, paths: Mapping[nn.Module, str]) -> dict[nn.Module, str]:
    """The pattern of each module's path; with "@1", "@2" … where the layers of one pattern have maps of several sizes,
    as the stages of a pyramid have (SegFormer) and queries that read one after the other of them (Mask2Former)."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for module, map in calls:
        seen = sizes.setdefault(pattern(paths[module]), [])
        seen += [map.shape[2:]] if map.shape[2:] not in seen else []
    found = {}
    for module, map in calls:
        where = pattern(paths[module])
        several = len(sizes[where]) > 1
        found[module] = f"{where}@{sizes[where].index(map.shape[2:]) + 1}" if several else where
    return found


def without_folded(hf: Any, calls: Calls, sample: Mapping[str, Tensor]) -> tuple[Calls, tuple[str, ...]]:
    """The calls of attention with one map for each example, picture or series, and the names of the other modules.

    ModelError where there are only others, such as windows that are folded into the batch.
    """
    rows = {batch_of(sample), pictures(sample), _channels(sample)}
    packed = any(given.dim() == 2 for name, given in sample.items() if FLOATS.get(name) == "image")
    if packed or pictures(sample) or any(name.endswith("grid_thw") for name in sample):
        rows |= {1}  # the patches of all images may stand in one row (Qwen-VL, Pixtral)
    paths = {module: path for path, module in hf.named_modules()}
    folding = {type(module) for module, map in calls if map.shape[0] not in rows}
    kept, left = [], {}
    for module, map in calls:
        over_channels = "channel" in type(module).__name__.lower()  # DaViT
        if type(module) not in folding and not over_channels:
            kept.append((module, map))
        else:
            why = "attends over channels" if over_channels else "folds its windows into the batch"
            left.setdefault((type(module).__name__, pattern(paths[module]), why), paths[module])
    if left and not kept:
        (_, _, why), path = next(iter(left.items()))
        raise ModelError(f"{type(hf).__name__}: {path} {why}; its maps can not be read")
    return kept, tuple(f"{name} ({where}: it {why})" for name, where, why in left)


def batch_of(sample: Mapping[str, Tensor]) -> int:
    """How many examples a sample has: rows of text, where there is any, since pictures may be packed."""
    texts = (sample.get(name) for name in ("input_ids", "decoder_input_ids"))
    return len(next((ids for ids in texts if ids is not None), next(iter(sample.values()))))


def _channels(sample: Mapping[str, Tensor]) -> int | None:
    """How many series a model reads one by one where an example has several: each is a row of its maps (PatchTST)."""
    values = sample.get("past_values")
    return None if values is None or values.dim() < 3 else values[:, 0].numel()


def videos(sample: Mapping[str, Tensor]) -> int | None:
    """How many videos [video, frame, channel, height, width] a tower may see as a whole."""
    pixels = sample.get("pixel_values")
    return None if pixels is None or pixels.dim() != 5 else len(pixels)


def pictures(sample: Mapping[str, Tensor]) -> int | None:
    """How many pictures a tower sees one by one: several crops or frames of each example are rows of its maps."""
    pixels = sample.get("pixel_values")
    return None if pixels is None or pixels.dim() < 4 else pixels[..., 0, 0, 0].numel()


def _name(hf: Any, where: str) -> str:
    if CROSS.search(where.rpartition(".*.")[2]):
        return "cross"
    pieces = where.split(".")
    if getattr(hf.config, "is_encoder_decoder", False):
        own = "vision" if VISION.search(where) else "decoder"
        return next((p for p in pieces if p in ("encoder", "decoder")), own)
    if VISION.search(where):
        return "vision"
    if AUDIO.search(where):
        return "audio"
    if embedding(hf) is not None:
        return "text"
    if "decoder" in where:  # SAM and MaskFormer decode queries of their own
        return "decoder"
    return {"audio": "audio", "series": "series"}.get(FLOATS.get(float_input(hf) or "", ""), "vision")


def main_first(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The same parts, the main one first: the decoder, else the text, else the first."""
    main = next((n for n in ("decoder", "text") if n in parts), next(iter(parts)))
    return {main: parts[main], **{n: p for n, p in parts.items() if n != main}}


def _part(
    hf: Any,
    name: str,
    axes: Axes,
    calls: list[tuple[nn.Module, AttentionMap]],
    paths: Mapping[nn.Module, str],
    sample: Any,
) -> Part:
    map = calls[0][1]
    corner = map.tile(slice(0, PROBE), slice(0, PROBE))
    causal = axes.queries == axes.keys and map.shape[2] > 1 and not bool(corner.triu(1).any())
    alone = axes.queries == axes.keys == "image" and map.shape[0] in (pictures(sample), videos(sample))
    patches = patches_of(hf, map.shape[3], sample) if alone else None
    sound = next((t for n, t in sample.items() if FLOATS.get(n) == "audio"), None)
    time, lengths = -1, None
    if sound is not None:
        time = time_axis(hf, sound)
        lengths = getattr(hf, "_get_feat_extract_output_lengths", None)
        if (
            lengths is not None
            and axes.keys == "audio"
            and not _counts(lengths, sound.shape[time], map.shape[3])
        ):
            lengths = None
    layers = number(calls, paths)
    shapes = {}
    for module, m in calls:
        features = windows.head_width(module) or m.q.shape[3]  # in DeepSeek values are narrower
        own = int(getattr(module, "v_head_dim", None) or features)
        shapes[layers[module]] = Shape(m.shape[1], m.k.shape[1], features, own)
    return Part(
        name, layers, axes.queries, axes.keys, causal, shapes,
        width(hf, calls[0][0], map.shape[1] * map.q.shape[3]), patches,
        sound.shape[time] / map.shape[3] if sound is not None and axes.keys == "audio" else 1.0, lengths, axes.counts,
        beside=bool(FLOATS.keys() & sample.keys()), time=time,
    )  # fmt: skip


def _counts(lengths: Callable[[int], Any], samples: int, positions: int) -> bool:
    """Whether the model's own function from samples to positions gives the positions of a run."""
    try:
        return int(lengths(samples)) == positions
    except Exception:  # of any kind: it is another model's code, and some take tensors alone
        return False


def number(calls: Iterable[tuple[nn.Module, Any]], paths: Mapping[nn.Module, str]) -> dict[nn.Module, int]:
    """The layer of each module: its `layer_idx` if these are numbers that all differ; else its place in its list of
    blocks, where all stand in one list; else the order of the calls."""
    modules = list(dict.fromkeys(module for module, _ in calls))
    own = [getattr(module, "layer_idx", None) for module in modules]
    if not all(isinstance(n, int) and n >= 0 for n in own) or len(set(own)) < len(own):
        steps = [paths[module].split(".") for module in modules]
        alike = len({pattern(paths[module]) for module in modules}) == 1
        places = [n for n, piece in enumerate(steps[0]) if piece.isdigit() and alike]
        differing = [n for n in places if len({path[n] for path in steps}) > 1]
        if len(differing) != 1:
            return {module: layer for layer, module in enumerate(modules)}
        own = [int(path[differing[0]]) for path in steps]
    return dict(zip(modules, own, strict=True))  # type: ignore[arg-type]


def width(hf: Any, module: nn.Module, otherwise: int | None = None) -> int:
    """The number of features of the residual stream; `otherwise` where the configuration names none for all layers."""
    if own := windows.head_width(module):  # stages differ in width
        return own * int(module.num_attention_heads)  # type: ignore[arg-type]
    for config in (getattr(module, "config", None), hf.config.get_text_config(), hf.config):
        for known in ("hidden_size", "d_model", "n_embd"):
            value = getattr(config, known, None)
            if isinstance(value, int):
                return value
    if otherwise is not None:
        return otherwise
    raise ModelError(f"{type(hf).__name__}: its configuration does not say how wide the residual stream is")


def patches_of(hf: Any, length: int, sample: Mapping[str, Any]) -> Patches | None:
    """How the images of the sample became the `length` tokens of a tower; None where sizes and tokens do not fit."""
    config, pixels = vision_config(hf), sample.get("pixel_values")
    image, size = (pair(getattr(config, field, None)) for field in ("image_size", "patch_size"))
    depth = getattr(config, "tubelet_size", 0) if videos(sample) else 0
    if isinstance(depth, list | tuple) and len(depth) == 3:  # (frames, height, width), of ViViT
        depth, size = int(depth[0]), pair(depth[1:])
    if image is None or size is None or not isinstance(depth, int):
        return None
    height, width = image if pixels is None or pixels.dim() < 4 else pixels.shape[-2:]
    frames = sample["pixel_values"].shape[1] // depth if depth else 1
    prefix = length - frames * (height // size[0]) * (width // size[1])
    return Patches(size, image, prefix, depth=depth) if prefix >= 0 else None
