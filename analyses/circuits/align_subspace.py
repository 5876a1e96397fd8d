"""Distributed alignment search: the subspace of an activation that holds one variable of a task.

Interchange interventions (Geiger et al. 2021) put the source prompt's activation into a run of the base prompt; Geiger
et al. 2024 train an orthogonal map so that only a few of its directions have to be exchanged.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Seed
from headwater.analyses._measures.measure import Explained, PositionSetting
from headwater.analyses._measures.pair_scores import AnswerOfPairs
from headwater.analyses._prompts.examples import Batch, Examples, as_tokens, output_in
from headwater.analyses._prompts.pairs import PairExamples, Pairs, pairs_of, side_by_side
from headwater.analyses._prompts.positions import Positions, place_of
from headwater.analyses._runs.replace_activations import Swap
from headwater.lens.edits.base import Edit
from headwater.lens.edits.residual import EditMLP, EditResidual
from headwater.lens.errors import AnalysisError
from headwater.lens.files import as_path, parse_json, read_bytes, write_bytes
from headwater.lens.model import HookedModel
from headwater.lens.models import inputs
from headwater.lens.naming.heads import HeadNames, chosen_layers, named
from headwater.lens.progress import progress

NAMES = {"residual": "hook_resid_pre", "mlp": "hook_mlp_out", "head": "attn.hook_z"}
BY = ("learned", "full", "random", "none")
MOST_BYTES = 2**28  # of a file of subspaces


@analysis
def align_subspace(
    model: HookedModel,
    clean: Examples | PairExamples,
    corrupt: Examples | None = None,
    what: Annotated[Literal["residual", "mlp", "head"], "whose vector is exchanged"] = "residual",
    layers: Annotated[Positions, 'layers, each with a subspace of its own, or "all"'] = "all",
    heads: Annotated[HeadNames | None, 'what="head": heads, as "5.1 7.0"'] = None,
    size: Annotated[int, "directions that are exchanged", Bounds(1)] = 1,
    answer: AnswerOfPairs = None,
    position: PositionSetting = -1,
    at: Annotated[
        int | Sequence[int] | None,
        "position of the vector, or one for each pair; none: the explained position",
    ] = None,
    steps: Annotated[int, "steps of Adam, each on one batch", Bounds(1)] = 60,
    rate: Annotated[float, "learning rate", Bounds(0.0)] = 1e-2,
    controls: Annotated[int, "random subspaces", Bounds(1)] = 3,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
) -> xr.Dataset:
    """Train R [size, feature] with orthonormal rows so that `x_corrupt + RᵀR (x_clean - x_corrupt)` gives the answer.

    The clean prompt of a pair is the source, the corrupt one the base: the base runs with the source's part of one
    vector at the position `at`, of the stream that enters a layer, the output of its MLP, or z of a head. `answer` is
    what the base should say at `position` then: what the task says once the variable has the source's value
    (`cross_pairs` makes such pairs). R minimises the cross-entropy of the answer on a random half of the pairs; the
    other half judges.

    Dataset over `site` ("3", or a head, "3.1"): `accuracy` [site, by], the share of the judging pairs whose answer is
    the likeliest of all tokens (interchange accuracy), and `loss` [site, by], its cross-entropy. `by`: "learned",
    "full" (the whole vector is exchanged), "random" (as many random directions, mean over `controls`), "none". A name
    out of many takes many directions: in tasks-4l, of 59 names, 48 directions of 256 give .90, 16 .41, the vector .96.
    `basis` [site, direction, feature] is R; `training_loss` [site, step]. Full exchange is no upper bound: it also
    carries what the variable is not.

    Question: Which directions of a vector hold a variable of the task?
    Unit: share of pairs (accuracy), nats (loss).
    Source: Geiger et al. 2021, arXiv:2106.02997; Geiger et al. 2024, arXiv:2303.02536, with torch's orthogonal
    parametrization; from memory.
    Cost: `steps` forward and backward passes over a batch for every site, and 3 + controls passes over all pairs.
    Not for: showing that the model uses a variable where a large subspace is trained on few pairs, which can make an
    answer out of anything; sizes near that of the vector; variables that stand at several positions.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> pairs = hw.analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=12), "answer")
    >>> found = hw.analyses.align_subspace(model, pairs, layers=[3], size=4, steps=2)
    >>> found.accuracy.dims, found.basis.shape
    (('site', 'by'), (1, 4, 256))
    """
    sites = _sites(model, what, layers, heads)
    groups = pairs_of(model, side_by_side(model, clean, corrupt), batch_size)
    count = sum(len(pairs.places) for pairs in groups)
    if count < 4:
        raise AnalysisError(
            f"{count} pairs are too few; half of them train and half judge, so give 4 or more"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    judged = set(order[: count // 2])
    if isinstance(at, Sequence) and len(at) != count:
        raise AnalysisError(f"at has {len(at)} positions for {count} pairs; give one, or one for each pair")
    labels = [_labels(model, pairs, answer, position) for pairs in groups]
    rows = []
    for name, head in progress(list(sites.values()), desc="align", unit="site"):
        cases = [
            _Case.of(model, pairs, ids, name, head, position, position if at is None else at)
            for pairs, ids in zip(groups, labels, strict=True)
        ]
        width = cases[0].source.shape[-1]
        if size > width:
            raise AnalysisError(f"size={size}, but the vector has {width} numbers; give 1 to {width}")
        learn = [each for case in cases if (each := case.of_places(lambda place: place not in judged))]
        judge = [each for case in cases if (each := case.of_places(lambda place: place in judged))]
        basis, history = _trained(learn, size, width, steps, rate, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        drawn = [torch.linalg.qr(torch.randn(width, size, generator=generator))[0].T for _ in range(controls)]
        ways = {
            "learned": [basis],
            "full": [torch.eye(width)],
            "random": drawn,
            "none": [torch.zeros(1, width)],
        }
        told = [torch.stack([_judged(judge, each) for each in ways[by]]).mean(0) for by in BY]
        rows.append((torch.stack(told), basis, torch.tensor(history)))
    told, bases, losses = (torch.stack(side).double().numpy() for side in zip(*rows, strict=True))
    return xr.Dataset(
        {
            "accuracy": (("site", "by"), told[..., 0]),
            "loss": (("site", "by"), told[..., 1]),
            "basis": (("site", "direction", "feature"), bases),
            "training_loss": (("site", "step"), losses),
        },
        coords={"site": list(sites), "by": list(BY)},
        attrs={
            "trained_on": count - len(judged), "judged_on": len(judged), "at": position if at is None else at,
        },
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Case:
    """Pairs of one length: base prompts, the source's vectors [pair, feature], the answers' tokens, and the columns of
    the vectors [pair]; the answer is read in `column`."""

    model: HookedModel
    base: Tensor
    source: Tensor
    labels: Tensor
    places: list[int]
    name: str
    head: int | None
    column: int
    at: Tensor

    @classmethod
    def of(
        cls, model: HookedModel, pairs: Pairs, labels: Tensor, name: str, head: int | None, position: int,
        at: int | Sequence[int],
    ) -> _Case:  # fmt: skip
        column = place_of(position, pairs.length, f"pair {pairs.places[0]}")
        columns = [
            place_of(at if isinstance(at, int) else int(at[place]), pairs.length, f"pair {place}", "at")
            for place in pairs.places
        ]
        seen = Swap(model, len(pairs.places), keep=[name])
        seen.logits(pairs.clean, column if model.has_lm_head else None)
        if seen.cache[name].shape[1] != pairs.length:
            raise AnalysisError(
                f"position counts the {pairs.length} tokens of a prompt, and the part {model.part_name!r} has "
                f"{seen.cache[name].shape[1]} of its own; take the part that reads the prompt"
            )
        found = seen.cache[name][torch.arange(len(columns)), columns]
        source = found if head is None else found[:, head]
        return cls(
            model, pairs.corrupt, source, labels, pairs.places, name, head, column, torch.tensor(columns)
        )

    def of_places(self, wanted: Callable[[int], bool]) -> _Case | None:
        """The pairs whose places are wanted; None if there are none."""
        rows = [row for row, place in enumerate(self.places) if wanted(place)]
        if not rows:
            return None
        base = Batch(self.base, self.places).rows(rows)
        places = [self.places[row] for row in rows]
        return _Case(
            self.model,
            base,
            self.source[rows],
            self.labels[rows],
            places,
            self.name,
            self.head,
            self.column,
            self.at[rows],
        )

    def logits(self, basis: Tensor) -> Tensor:
        """[pair, token or class] of the base prompts with the source's part in the span of the rows of `basis`."""
        basis = basis.to(self.source)

        def exchange(x: Tensor, hook: Any) -> Tensor:
            place = torch.arange(len(self.at)), self.at, *([] if self.head is None else [self.head])
            moved = x.clone()
            moved[place] = x[place] + (self.source.to(x) - x[place]) @ basis.T @ basis
            return moved

        hf: Any = self.model.hf
        swap = Swap(self.model, len(self.places), forward={self.name: exchange})
        with swap.on():
            found = hf(**inputs.arguments(self.model, as_tokens(self.base)))
        logits = output_in(self.model, found)
        return (logits[:, self.column] if logits.dim() == 3 else logits).float()


def _trained(
    cases: Sequence[_Case], size: int, width: int, steps: int, rate: float, seed: int
) -> tuple[Tensor, list[float]]:  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        rotation: Any = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(width, size, bias=False))
        optimiser, history = torch.optim.Adam(rotation.parameters(), lr=rate), []
        picked = random.Random(seed)
        parameters = list(rotation.parameters())
        for _ in range(steps):
            case = picked.choice(cases)
            loss = torch.nn.functional.cross_entropy(case.logits(rotation.weight), case.labels)
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = slope
            optimiser.step()
            history.append(float(loss.detach()))
        return rotation.weight.detach().clone(), history


def _judged(cases: Sequence[_Case], basis: Tensor) -> Tensor:
    """Accuracy and loss over all pairs, float64 [2]."""
    with torch.no_grad():
        pieces = [(case.logits(basis), case.labels) for case in cases]
    right = torch.cat([(logits.argmax(-1) == labels).double() for logits, labels in pieces])
    loss = torch.cat(
        [
            torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
            for logits, labels in pieces
        ]
    )
    return torch.stack([right.mean(), loss.mean()]).cpu()


def _sites(
    model: HookedModel, what: str, layers: Positions, heads: HeadNames | None
) -> dict[str, tuple[str, int | None]]:  # fmt: skip
    """{label: (activation, head)}."""
    if (what == "head") != (heads is not None):
        raise AnalysisError('heads goes with what="head", and names them, as heads="5.1 7.0"')
    if heads is not None:
        picked = named(heads, model.layers, model.n_heads)
        return {str(each): (f"blocks.{each.layer}.{NAMES[what]}", each.head) for each in picked}
    return {
        str(layer): (f"blocks.{layer}.{NAMES[what]}", None) for layer in chosen_layers(layers, model.layers)
    }


def _labels(model: HookedModel, pairs: Pairs, answer: Any, position: int) -> Tensor:
    asked = Explained(model, None, answer, None, position, "logit", True)
    ids = asked.ids_of("answer", Batch(pairs.clean, pairs.places))
    if ids is None:
        known = Explained(model, None, pairs.answers, None, position, "logit", True)
        ids = known.ids_of("answer", Batch(pairs.clean, list(range(len(pairs.places)))))
    if ids is None:
        raise AnalysisError("the pairs have no answers; give answer=, one token or one for each pair")
    return torch.tensor(ids, device=model.device)


def subspace_edits(model: HookedModel, found: xr.Dataset, site: str, source: Any) -> list[Edit]:
    """The exchange as edits that can be saved: the directions taken out at the position, the source's part put in.

    For the stream and the MLP; AnalysisError for heads, which have no such edit. `to_dict()` of each is JSON data;
    `write_subspace` keeps the directions themselves.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> pairs = hw.analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=12), "answer")
    >>> found = hw.analyses.align_subspace(model, pairs, layers=[3], size=2, steps=1)
    >>> [each.how for each in hw.analyses.subspace_edits(model, found, "3", pairs[0].prompt)]
    ['project_out', 'project_out', 'add']
    """
    what, position = found.attrs["what"], _places_of(found)
    if not isinstance(position, int):
        raise AnalysisError(
            "the pairs have positions of their own; set found.attrs['at'] to that of one prompt"
        )
    if what == "head":
        raise AnalysisError("heads have no edit that takes directions out; exchange the stream or an MLP")
    layer, name = int(site), f"blocks.{site}.{NAMES[what]}"
    ids = model.to_tokens(source)
    seen = Swap(model, 1, keep=[name])
    seen.logits(ids, ids.shape[1] - 1)
    basis = torch.from_numpy(found.basis.sel(site=site).values)
    x = seen.cache[name][0, position].double().cpu()
    kind = EditMLP if what == "mlp" else EditResidual
    out: list[Edit] = [kind(layer, "project_out", row.tolist(), positions=position) for row in basis]
    return [*out, kind(layer, "add", (basis.T @ (basis @ x)).tolist(), positions=position)]


def write_subspace(found: xr.Dataset, path: str | Path) -> Path:
    """Write the directions that `align_subspace` found to a safetensors file, one tensor [direction, feature] a site.

    >>> import headwater as hw
    >>> import tempfile
    >>> model = hw.load("tasks-4l")
    >>> pairs = hw.analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=12), "answer")
    >>> found = hw.analyses.align_subspace(model, pairs, layers=[3], size=2, steps=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = hw.analyses.write_subspace(found, f"{folder}/names.safetensors")
    ...     hw.analyses.read_subspace(path, model).basis.shape
    (1, 2, 256)
    """
    bases = torch.from_numpy(found.basis.values).float()
    held = {str(site): each.contiguous() for site, each in zip(found.site.values, bases, strict=True)}
    told = {"what": found.attrs["what"], "at": _places_of(found)}
    content = save(held, {"subspace": json.dumps(told)})
    return write_bytes(as_path(path, AnalysisError), content, AnalysisError)


def _places_of(found: xr.Dataset) -> int | list[int]:
    """The position, or one for each pair; attributes of results hold lists as text."""
    at = found.attrs["at"]
    return [int(each) for each in re.findall(r"-?\d+", at)] if isinstance(at, str) else int(at)


def read_subspace(path: str | Path, model: HookedModel) -> xr.Dataset:
    """`basis` [site, direction, feature] of a file of `write_subspace`, for `subspace_edits`.

    AnalysisError where the file is none, where the model lacks a site or its vectors have another width there, and
    where directions are not orthonormal.

    >>> import tempfile
    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> pairs = hw.analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=12), "answer")
    >>> found = hw.analyses.align_subspace(model, pairs, layers=[3], size=2, steps=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = hw.analyses.write_subspace(found, f"{folder}/two.safetensors")
    ...     hw.analyses.read_subspace(path, model).basis.shape
    (1, 2, 256)
    """
    path = as_path(path, AnalysisError)
    content = read_bytes(path, MOST_BYTES, AnalysisError, "give fewer sites")
    wrong = AnalysisError(f"{path} is not a file of write_subspace")
    try:
        (size,) = struct.unpack("<Q", content[:8])
        header = parse_json(content[8 : 8 + size].decode(), "its header", AnalysisError)
        told = parse_json(header["__metadata__"]["subspace"], "subspace", AnalysisError)
        held, what, at = load(content), told["what"], told["at"]
    except (SafetensorError, struct.error, UnicodeDecodeError, KeyError, TypeError, AnalysisError):
        raise wrong from None
    if not isinstance(what, str) or what not in NAMES or not held or not _places(at):
        raise wrong
    sites = _in_order(model, what, list(held))
    width = model.d_value if what == "head" else model.d_model
    for site, basis in held.items():
        if basis.dim() != 2 or basis.shape[1] != width:
            raise AnalysisError(
                f"{path}: the directions of {site} are {tuple(basis.shape)}, but vectors of {model.name} have {width} "
                "numbers there; open the file with the model it was made for"
            )
        basis = basis.double()
        if not torch.allclose(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-4):
            raise AnalysisError(f"{path}: the directions of {site} are not orthonormal")
    if len({len(basis) for basis in held.values()}) > 1:
        raise wrong
    bases = torch.stack([held[site].double() for site in sites]).numpy()
    return xr.Dataset(
        {"basis": (("site", "direction", "feature"), bases)},
        coords={"site": sites},
        attrs={"what": what, "at": at if isinstance(at, int) else str(at)},
    )


def _places(at: Any) -> bool:
    return type(at) is int or (isinstance(at, list) and all(type(each) is int for each in at))


def _in_order(model: HookedModel, what: str, sites: list[str]) -> list[str]:
    """The sites in the order of the model. Raises where it lacks one."""
    if what == "head":
        known = {str(each): each for each in named(sites, model.layers, model.n_heads)}
        if odd := [site for site in sites if site not in known]:
            raise AnalysisError(f"{odd[0]!r:.40} is no head as `write_subspace` names them, such as '5.1'")
        return sorted(known, key=lambda name: (known[name].layer, known[name].head))
    known = [str(layer) for layer in model.layers]
    if odd := [site for site in sites if site not in known]:
        raise AnalysisError(f"{model.name} has no layer {odd[0]!r:.40}")
    return sorted(sites, key=known.index)
