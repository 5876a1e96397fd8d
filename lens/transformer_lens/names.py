"""TransformerLens' activation names, and the module or attention step of a transformers model that each stands for.

`places(model)` lists the names of a model. `hook_embed`, `hook_pos_embed`, `hook_attn_out`, `hook_resid_mid` and
`hook_mlp_out` are listed only if they add up to the residual stream in a short run; in post-norm models such as BERT
they do not, and are left out. A module that mixes positions without attention has the name `hook_mixer_out`, and in a
decoder with cross-attention the attention of the other part `hook_other_attn_out`, which TransformerLens does not have;
blocks without attention have the names of what they hold. As in TransformerLens 4,
`hook_resid_mid` is the input of the norm before the MLP: a change there reaches the MLP but not the stream after it.
`attn.hook_result` is listed, but a cache keeps it only if it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.lens.attention import windows
from headwater.lens.errors import ModelError, nearest
from headwater.lens.models import blocks
from headwater.lens.models.blocks import TransformerBlock
from headwater.lens.models.linear import linear
from headwater.lens.models.opened import Opened
from headwater.lens.models.projections import Projections, projections
from headwater.lens.models.signature import embedding
from headwater.lens.models.stack import StackBlock
from headwater.lens.running.short_input import reads_text_alone, short_input
from headwater.lens.transformer_lens.run import Activation, Run

_known: WeakKeyDictionary[Opened, dict[str, Activation]] = WeakKeyDictionary()
ATTENTION = ("attn.hook_attn_scores", "attn.hook_pattern")
ROTARY = ("attn.hook_rot_q", "attn.hook_rot_k")
EMBEDDINGS = ("hook_embed", "hook_pos_embed")
WRITTEN = (  # what a block adds to the stream
    "hook_attn_out", "hook_other_attn_out", "hook_mixer_out", "hook_mlp_out",
)  # fmt: skip
# allowed relative difference of the stream from its sum, in float32 and float64, and in lower precision
SAME, SAME_COARSE = 1e-4, 2e-2


def places(model: Opened) -> dict[str, Activation]:
    """{name: activation} of a model, in the order of a forward pass; determined once per model."""
    if model not in _known:
        _refuse(model)
        found = {place.name: place for place in _all(model)}
        wrong = _not_adding_up(model, found)
        _known[model] = {name: place for name, place in found.items() if name not in wrong}
    return _known[model]


def _refuse(model: Opened) -> None:
    if any(windows.head_width(model.attention_module(layer)) for layer in model.layers):
        raise ModelError(
            f"{model.name} folds windows into the batch, so TransformerLens' names are not served"
        )
    if model.read_only:
        raise ModelError(
            f"{model.name} can be read but not changed ({model.read_only}), so TransformerLens' names are not served"
        )


def chosen(model: Opened, wanted: Any) -> list[str]:
    """The names that a filter selects: None (all but `hook_result`), a name, a list or a function of a name."""
    known = places(model)
    if wanted is None:
        return [name for name in known if not name.endswith("hook_result")]
    if callable(wanted):
        return [name for name in known if wanted(name)]
    named = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in named:
        check(model, name)
    return [name for name in known if name in named]


def check(model: Opened, name: str) -> Activation:
    """The activation of that name; ModelError suggests the nearest."""
    known = places(model)
    if name not in known:
        raise ModelError(f"{model.name} has no activation {name!r}: {nearest(str(name), known)}")
    return known[name]


def is_rotary(model: Opened) -> bool:
    """Whether the model has rotary position embeddings."""
    return any("rotary" in type(module).__name__.lower() for module in model.hf.modules())


def _all(model: Opened) -> Iterator[Activation]:
    if reads_text_alone(model):  # an encoder–decoder calls its table twice in a run
        yield Activation("hook_embed", "output", embedding(model.hf))
        for table in blocks.position_tables(model.hf)[:1]:
            yield Activation("hook_pos_embed", "output", table)
    rotary = is_rotary(model)
    others = {block.layer: block for block in model.stack}
    for layer in model.blocks:
        if layer in model.layers:
            yield from _of_block(model, layer, rotary)
            yield from _of_other_attention(model, layer)
        if layer in others:
            yield from _of_steps(model, others[layer])
    if model.part_name == next(iter(model.parts)):
        yield from _of_norm("ln_final.", blocks.final_norm(model))


def _of_other_attention(model: Opened, layer: int) -> Iterator[Activation]:
    """The attention of another part in the same block, if there is one such part."""
    others = [other for name in model.beside if layer in (other := model.part(name)).layers]
    if len(others) == 1:
        written = blocks.block(others[0], layer).attention_out
        yield Activation(f"blocks.{layer}.hook_other_attn_out", "output", written)


def _of_block(model: Opened, layer: int, rotary: bool) -> Iterator[Activation]:
    start = f"blocks.{layer}."
    try:
        block = blocks.block(model, layer)
    except ModelError:  # what stands in the attention alone is known
        block = None
    try:
        found = projections(model, layer)
    except ModelError:  # an unknown layout: hook_q, hook_k, hook_v and hook_result are left out
        found = None
    if block is not None:
        yield Activation(start + "hook_resid_pre", "input", block.module)
        yield from _of_norm(start + "ln1.", block.norm1)
    if found is not None:
        for letter, part in (("q", found.query), ("k", found.key), ("v", found.value)):
            yield Activation(f"{start}attn.hook_{letter}", "features", part.module, part.heads)
    for name in (*(ROTARY if rotary else ()), *ATTENTION):
        yield Activation(start + name, "attention")
    if found is None:
        yield Activation(start + "attn.hook_z", "attention")
    else:  # as in TransformerLens, what enters the output projection: with an output gate, z times the gate
        heads = model.shape(layer).heads
        yield Activation(start + "attn.hook_z", "entering", found.output, _by_head(heads))
        yield _result(found, heads, start)
    if block is not None:
        yield Activation(start + "hook_attn_out", "output", block.attention_out)
        yield from _of_mlp(start, block)
        yield Activation(start + "hook_resid_post", "output", block.module)


def _of_norm(start: str, norm: nn.Module | None) -> Iterator[Activation]:
    if norm is not None:
        yield Activation(start + "hook_scale", "scale", norm)
        yield Activation(start + "hook_normalized", "normalized", norm)


def _of_mlp(start: str, block: TransformerBlock) -> Iterator[Activation]:
    reads = block.norm2 if block.norm2 is not None else block.mlp
    if reads is not None:
        yield Activation(start + "hook_resid_mid", "input", reads)
    yield from _of_norm(start + "ln2.", block.norm2)
    for name, module, kind in (
        ("mlp.hook_pre", block.mlp_first, "output"),
        ("mlp.hook_pre_linear", block.mlp_linear, "output"),
        ("mlp.hook_post", block.mlp_last, "input"),
        ("hook_mlp_out", block.mlp_out, "output"),
    ):
        if module is not None:
            yield Activation(start + name, kind, module)  # type: ignore[arg-type]


def _of_steps(model: Opened, block: StackBlock) -> Iterator[Activation]:
    """Mixers without a map; in a block without attention its MLPs and the stream around it too."""
    start, module = f"blocks.{block.layer}.", model.hf.get_submodule(block.path)
    alone = block.layer not in model.layers
    if alone:
        yield Activation(start + "hook_resid_pre", "input", module)
    for kind in ("mixer", "mlp") if alone else ("mixer",):
        paths = [step.path for step in block.beside if step.kind == kind]
        if len(paths) == 1:  # what several write has no one name
            yield Activation(f"{start}hook_{kind}_out", "output", model.hf.get_submodule(paths[0]))
    if alone:
        yield Activation(start + "hook_resid_post", "output", module)


def _by_head(heads: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.unflatten(-1, (heads, -1))


def _result(found: Projections, heads: int, start: str) -> Activation:
    return Activation(
        start + "attn.hook_result", "result", found.output, _by_head(heads),
        lambda: linear(found.output).weight.unflatten(0, (heads, -1)),
    )  # fmt: skip


def _not_adding_up(model: Opened, known: Mapping[str, Activation]) -> set[str]:
    """The names of residual-stream terms that do not add up in this model, from one short run."""
    wanted = [
        n
        for n in known
        if n.endswith(("hook_resid_pre", "hook_resid_post", "hook_resid_mid", *EMBEDDINGS, *WRITTEN))
    ]
    given = short_input(model)
    run = Run(model, [known[name] for name in wanted], batch=len(next(iter(given.values()))), keep=wanted)
    with run.on(), torch.no_grad():
        model.hf(**given)
    embedded = [run.cache[name] for name in EMBEDDINGS if name in run.cache]
    first = run.cache.get(next((name for name in wanted if name.endswith("hook_resid_pre")), ""))
    wrong = set(run.missed) if _same(first, *embedded) else {*run.missed, *EMBEDDINGS}
    for layer in sorted({int(name.split(".")[1]) for name in wanted if name.startswith("blocks.")}):
        start = f"blocks.{layer}."
        pre, post, mid = (run.cache.get(f"{start}hook_resid_{name}") for name in ("pre", "post", "mid"))
        terms = {name: run.cache.get(start + name) for name in WRITTEN if start + name in known}
        before_mlp = [tensor for name, tensor in terms.items() if name != "hook_mlp_out"]
        serial = _same(mid, pre, *before_mlp) and _same(post, mid, terms.get("hook_mlp_out"))
        if not serial:
            wrong |= {f"{start}hook_resid_mid"}
        if not serial and not _same(post, pre, *terms.values()):
            wrong |= {start + name for name in WRITTEN}
    return wrong


def _same(total: Tensor | None, *terms: Tensor | None) -> bool:
    if total is None or any(term is None or term.shape[-1] != total.shape[-1] for term in terms):
        return False
    rest = total.float() - sum(term.float() for term in terms if term is not None)
    allowed = SAME if torch.finfo(total.dtype).eps < SAME else SAME_COARSE
    return bool(rest.norm() <= allowed * total.float().norm())
