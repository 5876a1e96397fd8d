"""Edits made from what a person gave in the form, and from published recipes, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import headwater as hw
from headwater.dashboard.running.edit_kinds import EditKind
from headwater.dashboard.running.measure import Measure
from headwater.lens import recipes
from headwater.lens.edits import EDITS, Edit
from headwater.lens.edits.named_positions import Names
from headwater.lens.errors import EditError, HeadwaterError
from headwater.lens.experiments import edits_on_parts
from headwater.lens.files import parse_json
from headwater.lens.models.axes import TEXTS
from headwater.lens.naming import positions

DIRECTIONS = {
    "difference": "from the distractor to the answer (unembedding)",
    "answer": "toward the answer (unembedding)",
    "numbers": "numbers, written as a list",
}


def made(kind: EditKind, given: Mapping[str, Any], model: hw.HookedModel, example: Any) -> dict[str, Any]:
    """The edit of which `given` are the answers to what its kind asks for. EditError or another where they do not fit.

    It is prepared for the model and the example once, so that heads, layers, numbers and words that do not exist are
    refused here.
    """
    values = dict(given)
    for ask in kind.asks:
        if ask.kind == "data":
            values[ask.name] = parse_json(str(values[ask.name]), ask.label, EditError)
    return _checked([EDITS[kind.name](**_fields(kind.name, values, model))], model, example)[0]


def _checked(edits: Sequence[Edit], model: hw.HookedModel, example: Any) -> list[dict[str, Any]]:
    """Edits as data, prepared for the model once. EditError where one does not fit, or the example lacks its tokens."""
    with model.edit(*edits):
        pass
    names, tokens = Names(model), model.to_tokens(example)
    for edit in edits:
        for named in edit.named_positions():
            if (name := names.missing(positions.check(named, "positions"), tokens)) is not None:
                raise EditError(f"{type(edit).__name__}: the input has no {name.removeprefix('token:')!r}")
    return [edit.to_dict() for edit in edits]


def _fields(kind: str, values: dict[str, Any], model: hw.HookedModel) -> dict[str, Any]:
    if kind == "ScaleHeads":
        return {"factors": dict.fromkeys(named_heads(values, model), values["factor"])}
    if kind == "AblateHeads":
        texts = [line for line in str(values.get("examples") or "").splitlines() if line.strip()]
        more = {} if values["ablation"] == "zero" else {"examples": texts}
        if more and not texts:
            raise EditError(
                f"{values['ablation']} takes the outputs from other texts: give some, one in a line"
            )
        return {"heads": values["heads"], "ablation": values["ablation"], **_at(values), **more}
    if kind == "HeadMix":
        share, count = values["amount"], model.n_heads
        mixed = (1 - share) * torch.eye(count) + share / count
        return {"post": mixed.tolist(), **_at(values)}
    if kind == "PruneTokens":
        return {
            "keep": {values["layer"]: float(values["share"])}, "score": values["score"],
            "positions": values["positions"],
        }  # fmt: skip
    if kind in ("EditResidual", "EditMLP"):
        direction = torch.as_tensor(values.pop("vector"), dtype=torch.float64)
        if not direction.any():
            raise EditError("a direction can not be all zero")
        amount = values.pop("amount")
        unit = direction / direction.norm()
        along = unit if values["how"] == "project_out" else amount * unit
        return {**values, "vector": [round(float(number), 6) for number in along]}
    return values


def named_heads(values: Mapping[str, Any], model: hw.HookedModel) -> list[str]:
    """The heads of an answer by name, also where whole layers were given."""
    given, layers = values.get("heads", "all"), values.get("layers", "all")
    if given != "all":
        return list(given)
    chosen = model.layers if layers == "all" else layers
    return [str(hw.Head(layer, head)) for layer in chosen for head in range(model.n_heads)]


def _at(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"layers": values["layers"]} if "layers" in values else {}


def direction(name: str, written: str, model: hw.HookedModel, measure: Measure) -> list[float]:
    """A direction of the residual stream: of the measure's tokens, or as it is written."""
    if name == "numbers":
        found = parse_json(written or "[]", "the direction", EditError)
        if not isinstance(found, list) or len(found) != model.d_model:
            raise EditError(f"a direction is a list of {model.d_model} numbers")
        return [float(number) for number in found]
    out = model.hf.get_output_embeddings()
    if measure.answer is None or out is None:
        raise EditError("the measure is not of a token, so it names no direction; write numbers")
    weight = out.weight.detach().double()
    found = weight[measure.answer]
    if name == "difference" and measure.wrong is not None:
        found = found - weight[measure.wrong]
    return found.tolist()


def directions(model: hw.HookedModel, measure: Measure) -> list[str]:
    """The directions that there are for a model and its measure: those of tokens in the stream that is unembedded."""
    unembedded = model.has_lm_head and model.parts[model.part_name].queries in ("text", "decoder")
    known = unembedded and measure.answer is not None
    return [name for name in DIRECTIONS if name == "numbers" or known]


def has_image_tokens(model: hw.HookedModel) -> bool:
    """Whether some tokens that the part looks at can be those of an image."""
    keys = model.parts[model.part_name].keys
    return model.image_token is not None if keys in TEXTS else keys == "image"


def has_words(model: hw.HookedModel, field: str) -> bool:
    """Whether the tokens that a field of an edit means can be named by what they are: those of a text, and no keys of
    cross-attention."""
    part, of_keys = model.parts[model.part_name], field not in ("queries", "positions")
    axis = part.keys if of_keys else part.queries
    return model.tokenizer is not None and axis in TEXTS and not (of_keys and part.crosses)


def takes_texts(model: hw.HookedModel) -> bool:
    """Whether other texts alone give the heads of the part other outputs."""
    return model.tokenizer is not None and model.parts[model.part_name].queries in TEXTS


@dataclass(frozen=True)
class Recipe:
    """A published change of attention. `fits` says for which models it is offered."""

    title: str
    make: Callable[[hw.HookedModel, Any, Any], Sequence[Edit]]
    fits: Callable[[hw.HookedModel], bool]


def _writes(model: hw.HookedModel) -> bool:
    return model.causal and model.has_lm_head


def _has_inner_layers(model: hw.HookedModel) -> bool:
    return _writes(model) and len(model.layers) > 3


def _sees_itself(model: hw.HookedModel) -> bool:
    return not model.parts[model.part_name].crosses


def _sees_and_writes(model: hw.HookedModel) -> bool:
    return _writes(model) and "vision" in model.parts


RECIPES = {
    "attention_calibration": Recipe(
        "calibrate the sinks (ACT)", lambda m, x, h: recipes.attention_calibration(m, h), _has_inner_layers
    ),
    "soft_perturbation": Recipe(
        "soft perturbation: toward the token itself", lambda m, x, h: recipes.soft_perturbation(h, 0.5), _sees_itself
    ),
    "off_by_one": Recipe("softmax off by one", lambda m, x, h: recipes.off_by_one(), lambda m: True),
    "streaming": Recipe("StreamingLLM, 1 sink and a window of 8", lambda m, x, h: recipes.streaming(1, 8), _writes),
    "heavy_hitters": Recipe(
        "heavy hitters, 2 and the latest 4", lambda m, x, h: recipes.heavy_hitters(2, 4), _writes
    ),
    "shifted_groups": Recipe("shifted groups of 4 tokens", lambda m, x, h: recipes.shifted_groups(m, 4), _writes),
    "sink_fixed_groups": Recipe(
        "groups of 4 tokens that keep the sink", lambda m, x, h: recipes.sink_fixed_groups(m, 4, sinks=1), _writes
    ),
    "visual_redistribution": Recipe(
        "visual attention redistribution", lambda m, x, h: recipes.visual_redistribution(m, x), _sees_and_writes
    ),
    "visual_emphasis": Recipe(
        "visual emphasis (PAINT)", lambda m, x, h: recipes.visual_emphasis(m, x), _sees_and_writes
    ),
    "head_reinforcement": Recipe(
        "vision-aware head reinforcement", lambda m, x, h: recipes.head_reinforcement(m, x), _sees_and_writes
    ),
    "flowcut": Recipe("FlowCut: half of the image tokens", lambda m, x, h: recipes.flowcut(m, 0.5), _sees_and_writes),
}  # fmt: skip


def fitting_recipes(model: hw.HookedModel) -> list[str]:
    return [name for name, recipe in RECIPES.items() if recipe.fits(model)]


def made_by(name: str, model: hw.HookedModel, example: Any, heads: Any) -> list[dict[str, Any]]:
    """The edits of a recipe, as data. An error of Headwater where one does not fit the model."""
    return _checked(RECIPES[name].make(model, example, heads), model, example)


def unfit(edit: Mapping[str, Any], model: hw.HookedModel) -> str:
    """Why an edit does not fit its part of a model; empty where it does."""
    data = {name: value for name, value in edit.items() if name != "off"}
    try:
        with edits_on_parts.editing(model, [edits_on_parts.read(data)]):
            return ""
    except HeadwaterError as error:
        return str(error)
